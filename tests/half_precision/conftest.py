"""Half precision switched on for a test, and NumPy's idea of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import paddle
import pytest

from finetune.half_precision import half_precision_on_cpu

DTYPES = ("bfloat16", "float16")


@pytest.fixture
def half() -> Iterator[None]:
    """Half precision on the CPU, for one test."""
    with half_precision_on_cpu():
        yield


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 numbers to the nearest of a type, ties to even, as float32."""
    array = np.asarray(array, np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    # bfloat16 keeps the upper 16 bits: add half of the last place that stays, less one where that place is even.
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def tensor(array: np.ndarray, dtype: str, *, trained: bool = True) -> paddle.Tensor:
    """A leaf tensor of a type."""
    made = paddle.to_tensor(np.asarray(array, np.float32)).astype(dtype)
    made.stop_gradient = not trained
    return made


def values(made: paddle.Tensor) -> np.ndarray:
    """What a tensor holds, as float32."""
    return made.astype("float32").numpy()


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Random float32 numbers."""
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
