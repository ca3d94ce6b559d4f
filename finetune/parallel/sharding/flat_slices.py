"""Tensors cut into flat slices of equal length, and collectives that carry many of them at once.

A tensor of m elements is cut for s ranks into slices of n = ceil(m / s) elements of its flat form; the last ones are
filled up with zeros. Collectives join tensors of one dtype into flat buffers of about 32 MB: few large messages in
place of many small ones, at the price of one such buffer. The order and the sizes follow from shapes alone, so every
rank makes the same calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import paddle

if TYPE_CHECKING:
    from finetune.processes.groups import Group

BUCKET_BYTES = 32 << 20


def slice_length(num_elements: int, num_slices: int) -> int:
    """Elements of each slice, the filling of the last ones included."""
    return -(-num_elements // num_slices)


def cut(tensor: Any, num_slices: int) -> Any:
    """All slices of a tensor, [num_slices, n]; a copy unless nothing has to be filled up."""
    flat = tensor.flatten()
    filling = slice_length(flat.shape[0], num_slices) * num_slices - flat.shape[0]
    if filling:
        flat = paddle.concat([flat, paddle.zeros([filling], dtype=flat.dtype)])
    return flat.reshape([num_slices, -1])


def join(slices: Sequence[Any], shape: Sequence[int]) -> Any:
    """The tensor of a shape from all its slices [n], in order; always new memory."""
    num_elements = 1
    for size in shape:
        num_elements *= size
    return paddle.concat(list(slices))[:num_elements].reshape(shape)


@contextmanager
def no_grad_no_autocast() -> Iterator[None]:
    """Neither recorded for backward nor recast by mixed precision."""
    with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
        yield


def plan_buckets(tensors: Iterable[Any], max_bytes: int | None = None) -> list[list[int]]:
    """Places of tensors that travel together: one dtype, up to `max_bytes` (`BUCKET_BYTES`) unless one has more.

    Only dtypes and shapes are looked at.
    """
    if max_bytes is None:
        max_bytes = BUCKET_BYTES
    buckets: list[list[int]] = []
    is_open: dict[Any, tuple[list[int], int]] = {}
    for place, tensor in enumerate(tensors):
        num_bytes = tensor.size * tensor.element_size()
        bucket, filled = is_open.get(tensor.dtype, ([], 0))
        if not bucket or filled + num_bytes > max_bytes:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(place)
        is_open[tensor.dtype] = (bucket, filled + num_bytes)
    return buckets


class GatheredTensors:
    """Whole tensors from the slices [n] that the ranks of a group hold; begun when it is made.

    Args:
        slices: This rank's, of one dtype.
        shapes: Of the whole tensors.
        group: The ranks that hold the slices.
    """

    def __init__(self, slices: Sequence[Any], shapes: Sequence[Sequence[int]], group: Group):
        self._lengths, self._shapes = [piece.shape[0] for piece in slices], shapes
        self._own = slices[0].clone() if len(slices) == 1 else paddle.concat(list(slices))
        self._parts = paddle.empty([group.size * sum(self._lengths)], dtype=self._own.dtype)
        self._task, self._size = group.begin_all_gather(self._parts, self._own), group.size

    def wait(self) -> list[Any]:
        """The tensors, in new memory."""
        self._task.wait()
        parts = self._parts.reshape([self._size, -1])  # [ranks, slices one after the other]
        self._own = self._parts = None
        wholes, begin = [], 0
        for length, shape in zip(self._lengths, self._shapes, strict=True):
            wholes.append(join(list(parts[:, begin : begin + length]), shape))
            begin += length
        return wholes


class FilledTensor:
    """A tensor that is filled, in place, from the slices that the ranks of a group hold; begun when it is made.

    Args:
        tensor: Whose elements the ranks share out evenly, without filling up.
        piece: This rank's slice [n].
        group: The ranks that hold the slices.
    """

    def __init__(self, tensor: Any, piece: Any, group: Group):
        self._memory = tensor.detach().view([-1])
        self._task = group.begin_all_gather(self._memory, piece.detach())

    def wait(self) -> None:
        """Returns when the tensor holds the slices of all ranks."""
        self._task.wait()
