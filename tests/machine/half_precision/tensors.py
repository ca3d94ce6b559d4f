"""Tensors for the tests of half precision."""

from __future__ import annotations

import numpy as np
import paddle


def tensor(values, dtype: str, *, trained: bool = False) -> paddle.Tensor:
    """A leaf of a dtype."""
    result = paddle.to_tensor(np.asarray(values, np.float32)).astype(dtype).detach()
    result.stop_gradient = not trained
    return result


def dtype_of(value: paddle.Tensor) -> str:
    """The name of a tensor's dtype."""
    return str(value.dtype).removeprefix("paddle.")


def values(made: paddle.Tensor) -> np.ndarray:
    """What a tensor holds, as float32."""
    return made.astype("float32").numpy()


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Random float32 numbers."""
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
