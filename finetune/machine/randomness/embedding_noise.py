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

from finetune.machine.randomness.seeding import derive_seed


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
        self._step = 0
        self._rows: Sequence[Sequence[tuple[int, int]]] = ()
        embedding.register_forward_post_hook(self._add_noise)

    @contextmanager
    def active(self, step: int, rows: Sequence[Sequence[tuple[int, int]]]) -> Iterator[None]:
        """Switches the noise on for one forward (and recomputed backward) pass.

        Args:
            step: The optimizer step. The same sample in the same step gets the same noise
                wherever, and in whatever company, it is computed.
            rows: For each row of the batch its samples in a row: (tokens, sample index). What is
                left of a row is padding.
        """
        self._step, self._rows = step, rows
        try:
            yield
        finally:
            self._rows = ()

    def _add_noise(self, _layer: Any, _inputs: Any, output: Any) -> Any:
        if not self._rows:
            return output
        return output + self._noise(output.shape).astype(output.dtype)

    def _noise(self, shape: Sequence[int]) -> Any:
        """[batch, length, hidden] float32, zero on padding."""
        import paddle

        _, max_length, hidden_size = shape
        rows = []
        for segments in self._rows:
            parts = [self._sample_noise(length, index, hidden_size) for length, index in segments]
            padding = max_length - sum(length for length, _ in segments)
            rows.append(paddle.concat([*parts, paddle.zeros([padding, hidden_size])]))
        return paddle.stack(rows)

    def _sample_noise(self, length: int, index: int, hidden_size: int) -> Any:
        import paddle

        scale = self.alpha / math.sqrt(length * hidden_size)
        seed = derive_seed(self.seed, "neftune", self._step, index)
        return paddle.uniform([length, hidden_size], dtype="float32", min=-scale, max=scale, seed=seed)
