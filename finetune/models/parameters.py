"""Copies stored tensors into a model's parameters without a second copy of either.

A tensor goes over in slices of at most `SLICE_BYTES`, each converted to the parameter's type on the way and
written in place. The pages of a mapped file count as memory of the process from the moment they are read;
they are given back after every slice, so that beside the model a process holds one slice in two or three
types: about 0.2 GB, however large the embeddings are.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from finetune.models import weights

SLICE_BYTES = 32 * 2**20


def assign(parameter: Any, array: np.ndarray) -> None:
    """Sets a parameter to a stored tensor of the same shape.

    Args:
        parameter: Paddle's tensor; its type stays.
        array: As `Checkpoint.read` gives it: any float type, bfloat16 as uint16; it may be a transposed view.
    """
    import paddle

    if array.ndim == 0 or parameter.size * 4 <= SLICE_BYTES:
        parameter.set_value(_converted(array, parameter.dtype))
        _release_pages(array)
        return
    # Along the axis whose steps in the file are the longest, so that a slice is one stretch of it.
    axis = int(np.argmax(np.abs(array.strides)))
    step = max(1, SLICE_BYTES * array.shape[axis] // (array.size * 4))
    with paddle.no_grad():
        for begin in range(0, array.shape[axis], step):
            place = (slice(None),) * axis + (slice(begin, begin + step),)
            parameter[place] = _converted(array[place], parameter.dtype)
            _release_pages(array)


def _converted(array: np.ndarray, dtype: Any) -> Any:
    import paddle

    return paddle.to_tensor(np.ascontiguousarray(weights.as_float32(array))).cast(dtype)


def _release_pages(array: np.ndarray) -> None:
    """Gives back the pages of a mapped file that were read so far; the array stays usable."""
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
