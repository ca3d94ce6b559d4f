"""The loss of a step, added up where it is computed."""

from __future__ import annotations

from typing import Any

import paddle


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
