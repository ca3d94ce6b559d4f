"""Copies stored tensors into a model's parameters without a second copy of either.

A tensor goes over in slices of at most `SLICE_BYTES`, each converted to the parameter's type on the way and
written in place. The pages of a mapped file count as memory of the process from the moment they are read;
they are given back after every slice, so that beside the model a process holds one slice in two or three
types: about 0.2 GB, however large the embeddings are.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.storage.dtypes import as_float32

SLICE_BYTES = 32 * 2**20


def assign(parameter: Any, array: NDArray[Any]) -> None:
    """Sets a parameter to a stored tensor, or its first rows and columns to a smaller one.

    Args:
        parameter: Paddle's tensor, as large as the stored one or larger; its type stays.
        array: As `Checkpoint.read` gives it: any float type, bfloat16 as uint16; it may be a transposed view.
    """
    import paddle

    if not parameter._is_initialized():  # made without memory, as those of a model that is quantised
        parameter.initialize()
    if tuple(array.shape) == tuple(parameter.shape) and max(array.size * 4, _span(array)) <= SLICE_BYTES:
        parameter.set_value(_converted(array, parameter.dtype))
        release_pages(array)
        return
    with paddle.no_grad():
        for place in _slices(array):
            parameter[place] = _converted(array[place], parameter.dtype)
            release_pages(array)


def mean_along(array: NDArray[Any], axis: int) -> NDArray[Any]:
    """Mean of a stored tensor over one axis, which stays with size 1; float32, summed in float64."""
    shape = tuple(1 if index == axis else size for index, size in enumerate(array.shape))
    total = np.zeros(shape, np.float64)  # size 1 along the axis
    for place in _slices(array):
        target = tuple(slice(None) if index == axis else part for index, part in enumerate(place))
        total[target] += as_float32(array[place]).sum(axis=axis, keepdims=True, dtype=np.float64)
        release_pages(array)
    return (total / array.shape[axis]).astype(np.float32)


def join_blocks(array: NDArray[Any], places: Sequence[tuple[slice, ...]], axis: int) -> NDArray[Any]:
    """Parts of a stored tensor side by side along an axis, in memory; the pages of its file are given back."""
    blocks = [array[place] for place in places]
    shape = list(blocks[0].shape)
    shape[axis] = sum(block.shape[axis] for block in blocks)
    joined = np.empty(shape, array.dtype)
    ends = np.cumsum([block.shape[axis] for block in blocks])[:-1]
    for block, target in zip(blocks, np.split(joined, ends, axis), strict=True):
        for place in _slices(block):
            target[place] = block[place]
            release_pages(block)
    return joined


def _span(array: NDArray[Any]) -> int:
    """Bytes of the file from an array's first element to its last; of a few columns, nearly the whole tensor."""
    return max(
        (abs(stride) * size for stride, size in zip(array.strides, array.shape, strict=True)), default=0
    )


def _slices(array: NDArray[Any]) -> Iterator[tuple[slice, ...]]:
    """Cuts along the axis whose steps in the file are the longest, so that a slice is one stretch of it."""
    axis = int(np.argmax(np.abs(array.strides)))
    step = max(1, SLICE_BYTES * array.shape[axis] // max(array.size * 4, _span(array), 1))
    whole = [slice(0, size) for size in array.shape]
    for begin in range(0, array.shape[axis], step):
        whole[axis] = slice(begin, min(begin + step, array.shape[axis]))
        yield tuple(whole)


def _converted(array: NDArray[Any], dtype: Any) -> Any:
    import paddle

    return paddle.to_tensor(np.ascontiguousarray(as_float32(array))).cast(dtype)


def release_pages(array: NDArray[Any]) -> None:
    """Gives back the pages of a mapped file that were read so far; the array stays usable."""
    mapping = getattr(array, "_mmap", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
