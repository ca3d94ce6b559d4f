"""Random numbers that depend on what is trained, not on how.

Every draw is keyed by its place in the run (seed, optimizer step, sample), so nothing
random has to be stored in a checkpoint: a resumed run draws what the uninterrupted one
would have drawn.
"""

import hashlib

import numpy as np

_MAX_SEED = 2**31 - 1


def derive_seed(seed: int, *key: int | str) -> int:
    """Hashes a run's seed and a key into an independent seed for one purpose.

    Args:
        seed: The seed of the run.
        *key: What the draw is for, such as a purpose and a step number.

    Returns:
        An integer in [1, 2**31 - 1]; 0 is avoided because Paddle reads it as "no seed".
    """
    text = "/".join(str(part) for part in (seed, *key))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _MAX_SEED + 1


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and Paddle for what is drawn outside training steps (initial weights)."""
    import random

    import paddle

    random.seed(seed)
    np.random.seed(seed % 2**32)
    paddle.seed(seed)
