"""What the trainer computes for the micro-batches of a step, as the pipelines ask for it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol


class MicroBatchComputation(Protocol):
    """What the trainer computes for a micro-batch."""

    def shape(self, number: int) -> tuple[int, ...]:
        """What the shapes of hidden states depend on: rows and tokens of each."""
        ...

    def context(self, number: int) -> AbstractContextManager[Any]:
        """Everything that must hold during the forward pass and the recomputation in the backward pass."""
        ...

    def forward(self, number: int) -> Any:
        """The model's outputs; only those of the last part are looked at."""
        ...

    def loss(self, number: int, outputs: Any) -> Any:
        """The scalar to differentiate, from the outputs of the last part."""
        ...

    def finished(self, number: int) -> None:
        """A backward pass of this micro-batch is done."""
        ...
