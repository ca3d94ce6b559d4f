"""What the trainer computes for the micro-batches of a step, as pipelines ask for it, and the sum of their losses."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import paddle


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


class LossSum:
    """A sum of scalar losses that stays on the device.

    Attributes:
        value: The sum so far, float64 [1]: float32 losses are added without a rounding error that matters.
    """

    def __init__(self) -> None:
        self.value: Any = paddle.zeros([1], dtype="float64")

    def add(self, loss: Any) -> None:
        """Adds a scalar of any float dtype; no gradient passes through the sum."""
        with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
            self.value = self.value + loss.detach().astype("float64").reshape([1])
