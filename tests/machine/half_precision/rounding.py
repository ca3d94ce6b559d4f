"""Half precision in NumPy, independent of the project: rounding written down by its definition."""

from __future__ import annotations

import numpy as np

DTYPES = ("bfloat16", "float16")


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that the dtype can hold, the nearest to the given ones; of two as near, the even one."""
    values = np.asarray(values, np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    # bfloat16 keeps 8 bits of the fraction's 24, whatever the exponent (float32's own).
    fraction, exponent = np.frexp(values.astype(np.float64))
    with np.errstate(over="ignore"):
        result = np.ldexp(np.rint(fraction * 256), exponent - 8).astype(np.float32)
    bits = result.view(np.uint32) if result.ndim else result.reshape(1).view(np.uint32)
    assert not (bits[np.isfinite(np.atleast_1d(result))] & 0xFFFF).any(), "below the normal range of bfloat16"
    return np.where(np.isfinite(values), result, values)


def as_float32(array: np.ndarray) -> np.ndarray:
    """What Paddle's `numpy()` of a half-precision tensor means; bfloat16 comes as its bits in uint16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32)
