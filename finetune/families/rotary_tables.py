"""Cosines and sines of the positions of a batch."""

from __future__ import annotations

from typing import Any

import paddle
from numpy.typing import NDArray


class RotaryTables:
    """Cosine and sine at the positions of a batch, float32, worked out once for all layers of a model.

    Args:
        frequencies: Radians per position of each pair of places, float32 [turned / 2]; see `rotary_scaling`.
        halves: Whether place i is paired with place i + turned / 2; otherwise with its neighbour.
        amplitude: What both are multiplied with.
    """

    def __init__(self, frequencies: NDArray[Any], *, halves: bool, amplitude: float = 1.0):
        self.frequencies, self.halves, self.amplitude = frequencies, halves, amplitude
        self._last: tuple[Any, Any, Any] | None = None

    def at(self, position_ids: Any) -> tuple[Any, Any]:
        """Cosine and sine [batch, length, 1, turned] at positions [batch, length]."""
        # Every layer is called with the same tensor.
        if self._last is None or self._last[0] is not position_ids:
            self._last = (position_ids, *self._work_out(position_ids))
        return self._last[1:]

    def _work_out(self, position_ids: Any) -> tuple[Any, Any]:
        with paddle.amp.auto_cast(enable=False), paddle.no_grad():
            frequencies = paddle.to_tensor(self.frequencies)  # [turned / 2]
            angles = position_ids.astype("float32").unsqueeze(-1) * frequencies  # [batch, length, turned / 2]
            if self.halves:
                angles = paddle.concat([angles, angles], axis=-1)  # [batch, length, turned]
            else:
                angles = paddle.stack([angles, angles], axis=-1).flatten(2)
            angles = angles.unsqueeze(2)
            if self.amplitude == 1.0:
                return angles.cos(), angles.sin()
            return angles.cos() * self.amplitude, angles.sin() * self.amplitude
