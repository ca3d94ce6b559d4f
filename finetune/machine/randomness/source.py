"""What the training loop asks of everything that draws by sample."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol


class Randomness(Protocol):
    """Something that draws by sample."""

    def active(self, step: int, rows: Sequence[Sequence[tuple[int, int]]]) -> AbstractContextManager[None]:
        """Draws within the block for a micro-batch of an optimizer step.

        Args:
            step: The optimizer step.
            rows: For each row of the batch its samples in a row: (tokens, sample index).
        """
        ...
