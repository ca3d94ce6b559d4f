"""Random numbers of sampling that depend on seed, sample and place alone, not on the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def uniform_draws(seed: int, sample: int, count: int) -> NDArray[Any]:
    """Numbers in [0, 1) for the first `count` tokens of a sample, float32 [count].

    Philox (Salmon et al. 2011) is keyed by seed and sample, so any sample can be drawn again alone, and more
    tokens go on with the same row.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, sample]))
    return generator.random(count, dtype=np.float32)
