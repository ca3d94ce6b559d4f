"""Gradient clipping by global norm that also reports the norm."""

from __future__ import annotations

from typing import Any

import paddle
from paddle.nn import ClipGradByGlobalNorm


class RecordingClip(ClipGradByGlobalNorm):
    """Scales all gradients by max_norm / max(norm, max_norm) and keeps the norm for the log.

    Args:
        max_norm: Largest allowed L2 norm over all gradients; 0 or less only measures.
    """

    def __init__(self, max_norm: float):
        super().__init__(max_norm if max_norm > 0 else float("inf"))
        self._norm: Any = None

    def last_norm(self) -> float:
        """The L2 norm of all gradients at the last update, before clipping."""
        return float("nan") if self._norm is None else float(self._norm)

    @paddle.no_grad()
    def _dygraph_clip(self, params_grads: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        gradients = [gradient for _, gradient in params_grads if gradient is not None]
        squares = [(gradient.astype("float32") ** 2).sum() for gradient in gradients]
        self._norm = paddle.stack(squares).sum().sqrt()
        if not float(self._norm) > self.clip_norm:
            return params_grads
        factor = self.clip_norm / self._norm
        return [
            (parameter, gradient if gradient is None else gradient * factor.astype(gradient.dtype))
            for parameter, gradient in params_grads
        ]
