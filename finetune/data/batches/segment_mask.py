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


def make_block_mask(
    segment_lengths: NDArray[Any], row_length: int, trunks: NDArray[Any] | None = None
) -> paddle.Tensor:
    """The mask of `finetune.data.batches.collate.block_mask` on the current device.

    Args:
        segment_lengths: int32 [B, S], 0 where a row has fewer segments.
        row_length: L.
        trunks: int32 [B, S], which segment each goes on from; None where all begin anew.

    Returns:
        bool [B, 1, L, L], True where a query (third axis) sees a key (last axis).
    """
    import paddle

    if paddle.get_device() == "cpu":
        return paddle.to_tensor(block_mask(list(segment_lengths), row_length, trunks))
    return compare_segments(segment_lengths, row_length, trunks)


def compare_segments(
    segment_lengths: NDArray[Any], row_length: int, trunks: NDArray[Any] | None = None
) -> paddle.Tensor:
    """The same by operations on the device: each pair of tokens is compared, nothing is read back."""
    import paddle

    num_rows, num_segments = segment_lengths.shape
    ends = paddle.to_tensor(np.cumsum(segment_lengths, axis=1, dtype=np.int32))  # [B, S]
    places = paddle.arange(row_length, dtype="int32")  # [L]
    numbers = paddle.searchsorted(
        ends, places.tile([num_rows, 1]), out_int32=True, right=True
    )  # [B, L], the segment of each token; S for padding
    is_padding = numbers == num_segments  # [B, L]
    # Padding sees itself alone: each padding token is a segment of its own.
    own = paddle.where(is_padding, numbers + places, numbers)
    is_same = own.unsqueeze(2) == own.unsqueeze(1)  # [B, L, L]
    if trunks is not None:
        found = paddle.take_along_axis(
            paddle.to_tensor(trunks), paddle.clip(numbers, max=num_segments - 1), axis=1
        )  # [B, L], the trunk of each token's segment
        found = paddle.where(is_padding, own, found)
        is_same = is_same | (found.unsqueeze(2) == own.unsqueeze(1))
    is_past = places.unsqueeze(1) >= places  # [L, L]
    return (is_same & is_past).unsqueeze(1)
