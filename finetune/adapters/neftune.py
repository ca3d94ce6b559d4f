"""NEFTune: uniform noise on the input embeddings of training samples.

Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning" (2023): each
embedding of a sample with L tokens of dimension d gets an independent draw from
U(-1, 1) scaled by alpha / sqrt(L * d). L is the length of the sample itself: padding
neither receives noise nor dilutes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from finetune.training.seeding import derive_seed


class EmbeddingNoise:
    """Adds NEFTune noise to what an embedding layer returns, only inside `active`.

    Args:
        embedding: The input embedding layer; its output is [batch, length, hidden].
        alpha: The noise scale of the paper; 5, 10 and 15 are its usual values.
        seed: The seed of the run.
    """

    def __init__(self, embedding: Any, *, alpha: float, seed: int):
        self.alpha = alpha
        self.seed = seed
        self._lengths: Sequence[int] = ()
        self._keys: Sequence[tuple[int, int]] = ()
        embedding.register_forward_post_hook(self._add_noise)

    @contextmanager
    def active(self, lengths: Sequence[int], keys: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Switches the noise on for one forward (and recomputed backward) pass.

        Args:
            lengths: Tokens of each row that are not padding, [batch].
            keys: (optimizer step, sample index) of each row: the same sample in the same step
                gets the same noise wherever and in whatever company it is computed.
        """
        self._lengths, self._keys = lengths, keys
        try:
            yield
        finally:
            self._lengths, self._keys = (), ()

    def _add_noise(self, _layer: Any, _inputs: Any, output: Any) -> Any:
        if not self._keys:
            return output
        return output + self._noise(output.shape).astype(output.dtype)

    def _noise(self, shape: Sequence[int]) -> Any:
        """[batch, length, hidden] float32, zero on padding."""
        import paddle

        _, max_length, hidden_size = shape
        rows = []
        for length, key in zip(self._lengths, self._keys, strict=True):
            scale = self.alpha / math.sqrt(length * hidden_size)
            seed = derive_seed(self.seed, "neftune", *key)
            row = paddle.uniform([length, hidden_size], dtype="float32", min=-scale, max=scale, seed=seed)
            padding = paddle.zeros([max_length - length, hidden_size])
            rows.append(paddle.concat([row, padding]))
        return paddle.stack(rows)
