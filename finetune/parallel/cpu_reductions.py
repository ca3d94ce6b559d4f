"""Reductions over ranks on NumPy arrays; half precision is added up in float32 and rounded once, as NCCL does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import numpy as np

from finetune.merge.row_blocks import rounded
from finetune.models.weights import as_float32

# What a tensor's numpy() is in half precision. NumPy has no bfloat16, and Paddle no unsigned 16-bit integers: the
# bits of the one come in the form of the other.
_HALVES = (np.dtype("float16"), np.dtype("uint16"))


def reduce_arrays(
    arrays: Iterable[np.ndarray], function: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Reduces arrays of one shape and dtype, from the first to the last.

    Args:
        arrays: At least one; uint16 are the bits of bfloat16.
        function: What `find_function` returned.

    Returns:
        An array of the same shape and dtype.
    """
    arrays = iter(arrays)
    first = next(arrays)
    if first.dtype not in _HALVES:
        return reduce(function, arrays, first)
    # Beyond float16 is infinity, and sums of infinities are no number, without a word, as on a device.
    with np.errstate(over="ignore", invalid="ignore"):
        total = reduce(function, map(as_float32, arrays), as_float32(first))
        return rounded(np.asarray(total), first.dtype).reshape(first.shape)


def find_function(op: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """NumPy's function for Paddle's reduction; None is the sum."""
    from paddle.base import core

    kinds = core.ReduceOp
    functions: dict[Any, Callable[..., Any]] = {
        kinds.SUM: np.add,
        kinds.MAX: np.maximum,
        kinds.MIN: np.minimum,
        kinds.PRODUCT: np.multiply,
    }
    return functions[kinds.SUM if op is None else op]
