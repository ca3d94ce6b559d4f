"""Matrices in 4 or 8 bits, their bytes equal to bitsandbytes'.

A matrix is W [out, in], as PyTorch stores linear layers; Paddle's is its transpose. Four bits: the elements are taken
row by row, `block_size` neighbours share a scale, their largest magnitude; a block may reach into the next row. An
element is the code of the table's value nearest to element / scale, two codes to a byte, the first in the upper
half. Eight bits: a row has one scale, and an element is the nearest of 255 even steps; values go through float16
first (Dettmers et al., "LLM.int8()", 2022; without its separate path for outliers, which bitsandbytes
has on GPUs only and which does not change the weights).

Nested scales: the mean of all scales is subtracted, and the rest is held in 8 bits by the dynamic table,
`double_quant_block_size` neighbours with one float32 scale.

Work goes on in stretches of about `STRETCH` elements: beside the matrix and its packed form a few MB are held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.storage.dtypes import array_dtype, as_float32, rounded
from finetune.storage.quantisation.code_tables import (
    TINY,
    Codes,
    Floats,
    dynamic_values,
    four_bit_values,
    nearest_dynamic,
    nearest_four_bit,
)
from finetune.storage.quantisation.grouped_matrix import GroupedMatrix
from finetune.storage.quantisation.scheme import QuantisationScheme

STRETCH = 2**20
_STEPS = np.float32(127)


@dataclass(frozen=True)
class NestedScales:
    """Scales of 4-bit blocks in 8 bits.

    Attributes:
        codes: Places in the dynamic table, uint8 [blocks].
        scales: Of stretches of `block_size` codes, float32.
        offset: Mean of what the codes stand for.
        block_size: Codes that share a scale.
    """

    codes: Codes
    scales: Floats
    offset: np.float32
    block_size: int

    def values(self) -> Floats:
        """The scales, float32 [blocks]."""
        spread = np.repeat(self.scales, self.block_size)[: self.codes.size]
        values: Floats = dynamic_values()[self.codes] * spread + self.offset
        return values


@dataclass(frozen=True)
class FourBitMatrix:
    """A matrix in "nf4" or "fp4".

    Attributes:
        kind: Which table of values.
        shape: [out, in].
        block_size: Elements that share a scale.
        codes: uint8 [ceil(out * in / 2)].
        scales: Largest magnitude of every block, float32 [blocks], or the same in 8 bits.
        rounded_to: Type that values are rounded to, by name; None leaves them float32.
    """

    kind: str
    shape: tuple[int, int]
    block_size: int
    codes: Codes
    scales: Floats | NestedScales
    rounded_to: str | None = None

    def scale_values(self) -> Floats:
        """Largest magnitude of every block, float32 [blocks]."""
        return self.scales.values() if isinstance(self.scales, NestedScales) else self.scales

    def values(self) -> Floats:
        """The matrix, float32 [out, in]: table value times scale."""
        pairs = np.stack([self.codes >> 4, self.codes & 15], axis=-1)  # [bytes, 2]
        count = self.shape[0] * self.shape[1]
        flat: Floats = four_bit_values(self.kind)[pairs.reshape(-1)[:count]]
        flat *= np.repeat(self.scale_values(), self.block_size)[:count]
        if self.rounded_to:
            flat = as_float32(rounded(flat, array_dtype(self.rounded_to)))
        return flat.reshape(self.shape)


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix in 8 bits.

    Attributes:
        codes: int8 [out, in].
        scales: Largest magnitude of every row, float32 [out].
    """

    codes: NDArray[np.int8]
    scales: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        num_rows, num_columns = self.codes.shape
        return num_rows, num_columns

    def values(self) -> Floats:
        """The matrix, float32 [out, in]."""
        return self.codes.astype(np.float32) * step_sizes(self.scales)[:, None]


PackedMatrix = FourBitMatrix | Int8Matrix | GroupedMatrix


def step_sizes(scales: Floats) -> Floats:
    """What one step of 8 bits is worth in each row: the product with 1 / 127 rounded, not the quotient."""
    return scales * np.float32(1 / 127)


def pack_matrix(matrix: NDArray[Any], scheme: QuantisationScheme, *, name: str) -> FourBitMatrix | Int8Matrix:
    """Quantises a matrix.

    Args:
        matrix: [out, in], any float type (bfloat16 as uint16); it may be a transposed view of a file.
        scheme: How.
        name: Of the tensor, for messages.

    Raises:
        UserError: It holds numbers that are not finite, or for 8 bits beyond float16.
    """
    packed = _pack_four_bit(matrix, scheme) if scheme.is_four_bit else _pack_int8(matrix)
    scales = packed.scale_values() if isinstance(packed, FourBitMatrix) else packed.scales
    if not np.isfinite(scales).all():
        limit = "" if scheme.is_four_bit else f", or beyond {np.finfo(np.float16).max:.0f}, float16's largest"
        raise UserError(
            f"{name} holds numbers that are not finite{limit}: it cannot be quantised to {scheme.algorithm}. "
            "Check the weights, or train without weight_quantize_algo"
        )
    return packed


def _pack_four_bit(matrix: NDArray[Any], scheme: QuantisationScheme) -> FourBitMatrix:
    num_rows, num_columns = matrix.shape
    count, size = num_rows * num_columns, scheme.block_size
    codes = np.empty(-(-count // 2), np.uint8)
    scales = np.empty(-(-count // size), np.float32)
    for begin, flat in _flat_stretches(matrix, size):
        packed, largest = _pack_stretch(flat, scheme)
        codes[begin // 2 : begin // 2 + packed.size] = packed
        scales[begin // size : begin // size + largest.size] = largest
    held = nest_scales(scales, scheme.double_quant_block_size) if scheme.double_quant else scales
    return FourBitMatrix(scheme.algorithm, (num_rows, num_columns), size, codes, held)


def _flat_stretches(matrix: NDArray[Any], block_size: int) -> Iterator[tuple[int, Floats]]:
    """First place and elements of stretches of the matrix, row by row; all but the last are whole blocks."""
    num_rows, num_columns = matrix.shape
    step = max(1, STRETCH // max(num_columns, 1))
    rest, begin = np.empty(0, np.float32), 0
    for row in range(0, num_rows, step):
        flat = as_float32(matrix[row : row + step]).reshape(-1)
        flat = np.concatenate([rest, flat]) if rest.size else flat
        is_last = row + step >= num_rows
        whole = flat.size if is_last else flat.size // block_size * block_size
        if whole:
            yield begin, flat[:whole]
        begin, rest = begin + whole, flat[whole:].copy()


def _pack_stretch(flat: Floats, scheme: QuantisationScheme) -> tuple[Codes, Floats]:
    """Bytes and scales of elements that begin with a block."""
    size = scheme.block_size
    whole = flat.size // size * size
    blocks = flat[:whole].reshape(-1, size)  # [blocks, size]
    largest = np.abs(blocks).max(axis=1)
    # The product with the reciprocal, as bitsandbytes: the quotient rounds otherwise. Its short last block divides.
    scaled = (blocks * (np.float32(1) / np.maximum(largest, TINY))[:, None]).reshape(-1)
    if whole < flat.size:
        last = np.maximum(np.abs(flat[whole:]).max(), TINY)
        largest, scaled = np.append(largest, last), np.append(scaled, flat[whole:] / last)
    if scaled.size % 2:
        scaled = np.append(scaled, np.float32(0))
    codes = nearest_four_bit(np.clip(scaled, np.float32(-1), np.float32(1)), scheme.algorithm)
    return _pair_codes(codes), largest


def _pair_codes(codes: Codes) -> Codes:
    """Two to a byte, the first in the upper half."""
    upper: Codes = np.left_shift(codes[::2], 4, dtype=np.uint8)
    return upper | codes[1::2]


def nest_scales(scales: Floats, block_size: int, *, offset: np.float32 | None = None) -> NestedScales:
    """Holds scales in 8 bits.

    Args:
        scales: float32 [blocks].
        block_size: Scales that share a scale of their own.
        offset: What is subtracted first; None: their mean, added up in float64.
    """
    offset = np.float32(scales.mean(dtype=np.float64)) if offset is None else offset
    rest = scales - offset
    starts = np.arange(0, rest.size, block_size)
    largest = np.maximum.reduceat(np.abs(rest), starts)
    spread = np.repeat(np.float32(1) / np.maximum(largest, TINY), block_size)[: rest.size]
    codes = nearest_dynamic(np.clip(rest * spread, np.float32(-1), np.float32(1)))
    return NestedScales(codes, largest, offset, block_size)


def _pack_int8(matrix: NDArray[Any]) -> Int8Matrix:
    codes, scales = np.empty(matrix.shape, np.int8), np.empty(matrix.shape[0], np.float32)
    step = max(1, STRETCH // max(matrix.shape[1], 1))
    for row in range(0, matrix.shape[0], step):
        with np.errstate(over="ignore"):  # what overflows float16 is told with the tensor's name
            halves = as_float32(matrix[row : row + step]).astype(np.float16).astype(np.float32)
        largest = np.abs(halves).max(axis=1)
        factor = np.float32(1) / np.where(largest == 0, np.float32(1), largest) * _STEPS
        scales[row : row + step] = largest
        if np.isfinite(largest).all():
            codes[row : row + step] = np.rint(halves * factor[:, None]).astype(np.int8)
    return Int8Matrix(codes, scales)
