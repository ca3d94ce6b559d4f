"""Matrices of integers, in groups of columns that share a scale and a zero point in each row.

    W[o, i] = (q[o, i] - zero[o, g]) * scale[o, g],    g = group of column i

GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023), AWQ
(Lin et al., 2024) and Hugging Face's compressed-tensors all store this, in layouts of their own, which the readers
beside this module turn into one: whole integers of 2, 4 or 8 bits in the bytes of a row, the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.storage.dtypes import array_dtype, as_float32, rounded

Bytes = NDArray[np.uint8]
STRETCH = 2**20
BITS = (2, 4, 8)


@dataclass(frozen=True)
class GroupedMatrix:
    """A matrix of integers with scales and zero points.

    Attributes:
        bits: 2, 4 or 8.
        shape: [out, in].
        codes: uint8 [out, ceil(in * bits / 8)].
        scales: [out, groups], float32, float16, or bfloat16 as uint16.
        zeros: Integer that stands for 0, uint8 [out, groups].
        group_of: Group of every column, int32 [in]; None: `in / groups` neighbours each.
        rounded_to: Type that values are rounded to.
    """

    bits: int
    shape: tuple[int, int]
    codes: Bytes
    scales: NDArray[Any]
    zeros: Bytes
    group_of: NDArray[np.int32] | None
    rounded_to: str

    def values(self) -> NDArray[np.float32]:
        """The matrix, float32 [out, in]."""
        values = np.empty(self.shape, np.float32)
        groups = self.column_groups()
        scales, zeros = as_float32(self.scales), self.zeros.astype(np.float32)
        dtype = array_dtype(self.rounded_to)
        step = max(1, STRETCH // max(self.shape[1], 1))
        for row in range(0, self.shape[0], step):
            rows = slice(row, row + step)
            part = unpack_codes(self.codes[rows], self.bits, self.shape[1]).astype(np.float32)
            part -= zeros[rows][:, groups]
            part *= scales[rows][:, groups]
            values[rows] = as_float32(rounded(part, dtype))
        return values

    def column_groups(self) -> NDArray[np.int32]:
        """Group of every column, int32 [in]."""
        if self.group_of is not None:
            return self.group_of
        size = self.shape[1] // self.scales.shape[1]
        return (np.arange(self.shape[1]) // size).astype(np.int32)


def pack_codes(codes: Bytes, bits: int) -> Bytes:
    """Integers [rows, n] -> bytes [rows, ceil(n * bits / 8)], the first in the lowest bits."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    per_byte = 8 // bits
    missing = -codes.shape[1] % per_byte
    if missing:
        codes = np.pad(codes, ((0, 0), (0, missing)))
    packed = codes[:, ::per_byte].copy()
    for place in range(1, per_byte):
        packed |= np.left_shift(codes[:, place::per_byte], bits * place, dtype=np.uint8)
    return packed


def unpack_codes(packed: Bytes, bits: int, count: int) -> Bytes:
    """What `pack_codes` packed: uint8 [rows, count]."""
    if bits == 8:
        return packed[:, :count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    places = packed[:, :, None] >> shifts & np.uint8(2**bits - 1)  # [rows, bytes, 8 / bits]
    return places.reshape(packed.shape[0], -1)[:, :count]


def regular_groups(groups: NDArray[np.int32], num_groups: int) -> NDArray[np.int32] | None:
    """None where groups are equally many neighbours each, in order; the groups of the columns otherwise."""
    if num_groups and groups.size % num_groups == 0:
        expected = np.arange(groups.size) // (groups.size // num_groups)
        if np.array_equal(groups, expected):
            return None
    return np.ascontiguousarray(groups, dtype=np.int32)


def cut_groups(matrix: GroupedMatrix, places: Sequence[tuple[slice, slice]], *, axis: int) -> GroupedMatrix:
    """Blocks of a matrix side by side: the same integers with the same scales.

    Args:
        matrix: The whole, [out, in].
        places: Rows and columns of each block.
        axis: 0: the blocks are different rows; 1: different columns.
    """
    if axis == 0:
        rows = np.concatenate([np.arange(matrix.shape[0])[each] for each, _ in places])
        return GroupedMatrix(
            matrix.bits,
            (rows.size, matrix.shape[1]),
            matrix.codes[rows],
            matrix.scales[rows],
            matrix.zeros[rows],
            matrix.group_of,
            matrix.rounded_to,
        )
    columns = np.concatenate([np.arange(matrix.shape[1])[each] for _, each in places])
    codes = unpack_codes(matrix.codes, matrix.bits, matrix.shape[1])[:, columns]
    used, groups = np.unique(matrix.column_groups()[columns], return_inverse=True)
    return GroupedMatrix(
        matrix.bits,
        (matrix.shape[0], columns.size),
        pack_codes(codes, matrix.bits),
        np.ascontiguousarray(matrix.scales[:, used]),
        np.ascontiguousarray(matrix.zeros[:, used]),
        regular_groups(groups.astype(np.int32), used.size),
        matrix.rounded_to,
    )
