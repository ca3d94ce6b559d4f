"""The dense mask of packed rows, made where it is used.

A mask of B rows of L tokens has B * L * L elements, 67 MB for 4 x 4096; what it says follows from the lengths of the
segments, a few hundred bytes. So only the lengths go to a GPU. On a CPU there is nothing to carry, and NumPy, which
fills rectangles and triangles, is ten times faster than comparing each pair of tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.batches.collate import block_mask

if TYPE_CHECKING:
    import paddle


def make_block_mask(segment_lengths: NDArray[Any], row_length: int) -> paddle.Tensor:
    """The mask of `finetune.data.batches.collate.block_mask` on the current device.

    Args:
        segment_lengths: int32 [B, S], 0 where a row has fewer segments.
        row_length: L.

    Returns:
        bool [B, 1, L, L], True where a query (third axis) sees a key (last axis).
    """
    import paddle

    if paddle.get_device() == "cpu":
        return paddle.to_tensor(block_mask(list(segment_lengths), row_length))
    return compare_segments(segment_lengths, row_length)


def compare_segments(segment_lengths: NDArray[Any], row_length: int) -> paddle.Tensor:
    """The same by operations on the device: each pair of tokens is compared, nothing is read back."""
    import paddle

    num_rows, num_segments = segment_lengths.shape
    ends = paddle.to_tensor(np.cumsum(segment_lengths, axis=1, dtype=np.int32))  # [B, S]
    places = paddle.arange(row_length, dtype="int32")  # [L]
    numbers = paddle.searchsorted(
        ends, places.tile([num_rows, 1]), out_int32=True, right=True
    )  # [B, L], the segment of each token; S for padding
    # Padding sees itself alone: each padding token is a segment of its own.
    numbers = paddle.where(numbers == num_segments, numbers + places, numbers)
    is_same = numbers.unsqueeze(2) == numbers.unsqueeze(1)  # [B, L, L]
    is_past = places.unsqueeze(1) >= places  # [L, L]
    return (is_same & is_past).unsqueeze(1)
