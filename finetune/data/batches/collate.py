"""From samples to the padded arrays of one micro-batch.

Right padding for training (a causal model never looks to the right, so padding changes nothing), left
padding for generation (the last column is then the newest token of every row). Packed rows need a mask
besides, which keeps the segments of a row apart; it is made here from their lengths and kept nowhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.data.samples.tokenize import IGNORE_INDEX, Prompt, Sample

if TYPE_CHECKING:
    from finetune.data.packing.packing import Bin

_TILE = 256
"""Side of the triangles along the diagonal of a dense mask; one is cached, the rest are rectangles."""


def collate(
    samples: Sequence[Sample], *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, NDArray[Any]]:
    """Pads samples on the right.

    Args:
        samples: B of them, at least one.
        pad_token_id: Fills input_ids.
        pad_to_multiple_of: Rounds the row length L up; None leaves the longest sample's.

    Returns:
        int64 arrays: ``input_ids``, ``labels`` (`IGNORE_INDEX` in the padding), ``attention_mask``
        (1 for tokens), ``position_ids`` (0 in the padding), each [B, L], and ``lengths`` [B].
    """
    lengths = _lengths([sample.input_ids for sample in samples])
    row_length = _round_up(int(lengths.max()), pad_to_multiple_of)
    columns = np.arange(row_length, dtype=np.int64)
    mask = columns < lengths[:, None]  # [B, L]
    return {
        "input_ids": _fill(mask, [sample.input_ids for sample in samples], pad_token_id),
        "labels": _fill(mask, [sample.labels for sample in samples], IGNORE_INDEX),
        "attention_mask": mask.astype(np.int64),
        "position_ids": columns * mask,
        "lengths": lengths,
    }


def collate_packed(
    bins: Sequence[Bin],
    *,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    row_length: int | None = None,
    mask: Literal["block", "start_end"] | None = "block",
) -> dict[str, NDArray[Any]]:
    """Pads bins on the right and builds what keeps their segments apart.

    Args:
        bins: B of them, at least one, with S segments at most.
        pad_token_id: Fills input_ids.
        pad_to_multiple_of: Rounds the row length L up.
        row_length: L before rounding, where rows of one size are wanted; None takes the longest bin's.
        mask: "block" for a dense mask; "start_end" for the row indices that PaddleNLP's flash-mask
            attention takes; None for neither.

    Returns:
        int64 arrays: ``input_ids``, ``labels`` (`IGNORE_INDEX` in the padding), ``position_ids`` (from 0
        in every segment, 0 in the padding), each [B, L]; ``lengths`` [B], tokens of each row;
        ``segment_lengths`` [B, S] (0 where a row has fewer segments) and ``sample_indices`` [B, S]
        (-1 there); and, named as the models' parameters are, ``attention_mask`` (see `block_mask`) or
        ``attn_mask_startend_row_indices`` (see `start_end_rows`).

    Raises:
        ValueError: No bin, one longer than `row_length`, or an unknown mask.
    """
    lengths = _lengths([row.input_ids for row in bins])
    row_length = int(lengths.max()) if row_length is None else row_length
    if lengths.max() > row_length:
        raise ValueError(f"a bin has {lengths.max()} tokens, expected at most the row length of {row_length}")
    row_length = _round_up(row_length, pad_to_multiple_of)
    is_token = np.arange(row_length, dtype=np.int64) < lengths[:, None]  # [B, L]
    segments = [row.segment_lengths for row in bins]
    is_segment = np.arange(max(map(len, segments))) < np.array([[len(row)] for row in segments])  # [B, S]
    batch = {
        "input_ids": _fill(is_token, [row.input_ids for row in bins], pad_token_id),
        "labels": _fill(is_token, [row.labels for row in bins], IGNORE_INDEX),
        "position_ids": _fill(is_token, [_count_within(row) for row in segments], 0),
        "lengths": lengths,
        "segment_lengths": _fill(is_segment, segments, 0),
        "sample_indices": _fill(is_segment, [row.sample_indices for row in bins], -1),
    }
    if mask == "block":
        batch["attention_mask"] = block_mask(segments, row_length)
    elif mask == "start_end":
        batch["attn_mask_startend_row_indices"] = start_end_rows(segments, row_length)
    elif mask is not None:
        raise ValueError(f"mask is {mask!r}, expected 'block', 'start_end' or None")
    return batch


def block_mask(
    segment_lengths: Sequence[NDArray[Any]], row_length: int, trunks: NDArray[Any] | None = None
) -> NDArray[Any]:
    """The dense causal mask of packed rows: a token sees itself and what precedes it in its segment.

    A padding token sees itself alone, since a row of the mask without any True gives NaN in some kernels::

        segments of 3 and 2, L = 6        1 . . . . .
                                          1 1 . . . .
                                          1 1 1 . . .
                                          . . . 1 . .
                                          . . . 1 1 .
                                          . . . . . 1

    A segment may go on from another one of its row, its trunk, which it sees whole: two answers to one prompt are
    two segments with the prompt as their trunk, and do not see each other.

    Args:
        segment_lengths: B rows of integers, their sums at most L.
        row_length: L.
        trunks: int32 [B, S], the number of the segment that each goes on from, its own for one that begins anew;
            None where all do. A trunk has no trunk itself, and stands directly in front of what goes on from it.

    Returns:
        bool [B, 1, L, L], True where a query (third axis) sees a key (last axis). PaddleNLP's models take
        a mask of four axes as it is: no causal mask is added, and False becomes the smallest float.
    """
    mask = np.zeros((len(segment_lengths), 1, row_length, row_length), dtype=bool)
    for number, (row, lengths) in enumerate(zip(mask, segment_lengths, strict=True)):
        stops = np.cumsum(lengths).tolist()
        starts = [0, *stops[:-1]]
        for place, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            _fill_triangle(row[0, start:stop, start:stop])
            if trunks is not None and (trunk := int(trunks[number, place])) != place:
                row[0, start:stop, starts[trunk] : stops[trunk]] = True
        np.fill_diagonal(row[0, stops[-1] :, stops[-1] :], True)
    return mask


def start_end_rows(
    segment_lengths: Sequence[NDArray[Any]], row_length: int, trunks: NDArray[Any] | None = None
) -> NDArray[Any]:
    """The same mask in the form of FlashMask (Wang et al. 2024), one number for each key.

    Args:
        segment_lengths: B rows of integers, their sums at most L.
        row_length: L.
        trunks: See `block_mask`.

    Returns:
        int32 [B, 1, L]: the first query that no longer sees a key; causal attention hides it from all
        before the key. It is the end of the key's segment, or of the last that goes on from it, and for padding
        the position after its own.
    """
    ends = np.tile(np.arange(1, row_length + 1, dtype=np.int32), (len(segment_lengths), 1, 1))
    for number, (row, lengths) in enumerate(zip(ends, segment_lengths, strict=True)):
        stops = np.cumsum(lengths)
        if trunks is not None:
            own = stops.copy()
            np.maximum.at(stops, trunks[number, : len(own)], own)
        stops = np.repeat(stops, lengths)
        row[0, : len(stops)] = stops
    return ends


def collate_prompts(prompts: Sequence[Prompt], *, pad_token_id: int) -> dict[str, NDArray[Any]]:
    """Pads prompts on the left.

    Args:
        prompts: B of them, at least one.
        pad_token_id: Fills input_ids.

    Returns:
        int64 [B, L]: ``input_ids``, ``attention_mask`` (1 for tokens) and ``position_ids`` (counting
        from 0 at the first token, 0 in the padding).
    """
    lengths = _lengths([prompt.input_ids for prompt in prompts])
    row_length = int(lengths.max())
    offsets = np.arange(row_length, dtype=np.int64) - (row_length - lengths[:, None])  # [B, L]
    mask = offsets >= 0
    return {
        "input_ids": _fill(mask, [prompt.input_ids for prompt in prompts], pad_token_id),
        "attention_mask": mask.astype(np.int64),
        "position_ids": offsets * mask,
    }


def _fill_triangle(square: NDArray[Any]) -> None:
    """Sets the diagonal and all below it, a band of rows at a time."""
    for start in range(0, len(square), _TILE):
        band = square[start : start + _TILE]
        band[:, :start] = True
        band[:, start : start + _TILE] = _triangle()[: len(band), : len(band)]


@functools.cache
def _triangle() -> NDArray[Any]:
    return np.tri(_TILE, dtype=bool)


def _count_within(lengths: NDArray[Any]) -> NDArray[Any]:
    """0, 1, ... anew in every segment."""
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    counts: NDArray[np.int64] = np.arange(lengths.sum()) - starts
    return counts


def _round_up(length: int, multiple: int | None) -> int:
    return -(-length // multiple) * multiple if multiple else length


def _lengths(rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if not rows:
        raise ValueError("a batch needs at least one sample")
    return np.array([len(row) for row in rows], dtype=np.int64)


def _fill(mask: NDArray[Any], rows: Sequence[NDArray[Any]], value: int) -> NDArray[Any]:
    """Writes the rows one after the other where the mask is set: both run in row-major order."""
    filled = np.full(mask.shape, value, dtype=np.int64)
    filled[mask] = np.concatenate(rows)
    return filled
