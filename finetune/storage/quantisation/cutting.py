"""The part of a packed matrix that one of several ranks holds: the same codes, the same values.

A matrix is quantised whole and then cut, so that the layout of a run changes nothing. Where a cut goes through blocks,
the part gets shorter ones, each with the scale of the block that it comes from:

    blocks of 64, rows of 160, columns 80 to 160     ->     blocks of gcd(64, 160, 80) = 16

Scales in 8 bits become float32, since their own blocks would be cut as well; that takes 4 / block_size bytes per
weight in place of 1 / block_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from finetune.errors import UserError
from finetune.storage.quantisation.grouped_matrix import GroupedMatrix, cut_groups
from finetune.storage.quantisation.packed_weights import FourBitMatrix, Int8Matrix, PackedMatrix

_SHORTEST_BLOCK = 8
Place = tuple[slice, slice]
"""Rows and columns."""


def cut_matrix(matrix: PackedMatrix, places: Sequence[Place], *, axis: int, name: str) -> PackedMatrix:
    """Blocks of a matrix side by side.

    Args:
        matrix: The whole, [out, in].
        places: What of it is wanted.
        axis: 0: the places are different rows; 1: different columns.
        name: Of the tensor, for messages.

    Raises:
        UserError: The cut would need blocks that are too short to be worth their scales.
    """
    if isinstance(matrix, Int8Matrix):
        codes = np.concatenate([matrix.codes[place] for place in places], axis=axis)
        rows = [place[0] for place in (places if axis == 0 else places[:1])]
        return Int8Matrix(np.ascontiguousarray(codes), np.concatenate([matrix.scales[each] for each in rows]))
    if isinstance(matrix, GroupedMatrix):
        return cut_groups(matrix, places, axis=axis)
    if axis == 0 and all(_is_whole_blocks(matrix, place[0]) for place in places):
        return _cut_stretches(matrix, [place[0] for place in places])
    return _cut_blocks(matrix, places, axis=axis, name=name)


def _bounds(part: slice, size: int) -> tuple[int, int]:
    first, stop, _ = part.indices(size)
    return first, stop


def _is_whole_blocks(matrix: FourBitMatrix, rows: slice) -> bool:
    return all(row * matrix.shape[1] % matrix.block_size == 0 for row in _bounds(rows, matrix.shape[0]))


def _cut_stretches(matrix: FourBitMatrix, parts: Sequence[slice]) -> FourBitMatrix:
    """Rows whose elements are whole blocks."""
    width, size = matrix.shape[1], matrix.block_size
    bounds = [_bounds(part, matrix.shape[0]) for part in parts]
    scales = matrix.scale_values()
    return FourBitMatrix(
        matrix.kind,
        (sum(stop - first for first, stop in bounds), width),
        size,
        np.concatenate([matrix.codes[first * width // 2 : stop * width // 2] for first, stop in bounds]),
        np.concatenate([scales[first * width // size : stop * width // size] for first, stop in bounds]),
        matrix.rounded_to,
    )


def _cut_blocks(matrix: FourBitMatrix, places: Sequence[Place], *, axis: int, name: str) -> FourBitMatrix:
    """Any rows and columns, in blocks that lie within the old ones and within a row."""
    num_rows, num_columns = matrix.shape
    edges = [edge for _, columns in places for edge in _bounds(columns, num_columns)]
    size = math.gcd(matrix.block_size, num_columns, *edges)
    if size < _SHORTEST_BLOCK:
        raise UserError(
            f"{name} has {num_columns} columns, of which this rank holds {edges[0]} to {edges[-1]}: blocks of "
            f"{matrix.block_size} with one scale each would be cut into blocks of {size}, fewer than "
            f"{_SHORTEST_BLOCK}. Use weight_quantize_algo llm.int8, or another tensor_parallel_degree"
        )
    count = num_rows * num_columns
    codes = np.stack([matrix.codes >> 4, matrix.codes & 15], axis=-1).reshape(-1)[:count]
    codes = codes.reshape(num_rows, num_columns)
    scales = np.repeat(matrix.scale_values(), matrix.block_size // size)[: count // size]
    scales = scales.reshape(num_rows, num_columns // size)
    kept = np.concatenate([codes[place] for place in places], axis=axis)
    held = [
        (rows, slice(*(edge // size for edge in _bounds(columns, num_columns)))) for rows, columns in places
    ]
    flat = kept.reshape(-1)
    return FourBitMatrix(
        matrix.kind,
        (kept.shape[0], kept.shape[1]),
        size,
        flat[::2] << 4 | flat[1::2],
        np.concatenate([scales[place] for place in held], axis=axis).reshape(-1),
        matrix.rounded_to,
    )
