"""Turns a matrix into integers with a scale for each row, or for each group of columns of a row.

    8 bits    even steps on both sides of 0:  scale = largest magnitude / 127
    4 bits    even steps from least to largest: scale = (largest - least) / 15, zero = -least / scale

To the nearest, or by GPTQ (Frantar et al., 2023, algorithm 1): columns are rounded one after the other, and what each
loses is made up for in those that follow, as far as the inputs X of the layer let them,

    error_i = (w_i - q_i) / U_ii,    w_j -= error_i * U_ij  for j > i,    U^T U = (2 X^T X + damping)^-1,  U upper
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.storage.dtypes import array_dtype, as_float32, rounded
from finetune.storage.quantisation.grouped_matrix import GroupedMatrix, pack_codes

Floats = NDArray[np.float32]
_DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it."""
_SMALLEST_STEP = 1e-7
_BLOCK = 128


class _Grid:
    """Scales and zero points of some columns of every row."""

    def __init__(self, columns: Floats, bits: int, dtype: str):
        top = 2**bits - 1
        if bits == 8:
            steps = np.abs(columns).max(axis=1) / np.float32(127)
        else:
            least = np.minimum(columns.min(axis=1), 0)
            steps = (np.maximum(columns.max(axis=1), 0) - least) / np.float32(top)
        self.stored = rounded(
            np.maximum(steps, np.float32(_SMALLEST_STEP)).astype(np.float32), array_dtype(dtype)
        )
        self.scales = as_float32(self.stored)
        self._least = 1 if bits == 8 else 0
        self._top = top
        zeros = np.full(len(columns), 128, np.float32) if bits == 8 else np.rint(-least / self.scales)
        self.zeros = np.clip(zeros, 0, top).astype(np.float32)

    def integers(self, columns: Floats) -> Floats:
        """Nearest integers of columns [out, n]."""
        near = np.rint(columns / self.scales[:, None]) + self.zeros[:, None]
        integers: Floats = np.clip(near, self._least, self._top)
        return integers

    def values(self, integers: Floats) -> Floats:
        """What integers stand for."""
        values: Floats = (integers - self.zeros[:, None]) * self.scales[:, None]
        return values


def round_nearest(matrix: Floats, bits: int, group_size: int, *, dtype: str) -> GroupedMatrix:
    """Every element to the nearest integer.

    Args:
        matrix: [out, in].
        bits: 4 or 8.
        group_size: Columns that share a scale in a row; -1: all.
        dtype: Type of scales and values.
    """

    def round_group(columns: Floats, grid: _Grid, begin: int) -> Floats:
        return grid.integers(columns)

    return _round(np.array(matrix, np.float32), bits, group_size, dtype, round_group)


def round_by_gptq(
    matrix: Floats, hessian: NDArray[np.float64], bits: int, group_size: int, *, dtype: str
) -> GroupedMatrix:
    """Integers that keep the layer's outputs on known inputs; see the module's text.

    Args:
        matrix: [out, in].
        hessian: X^T X [in, in] of the layer's inputs.
        bits: 4 or 8.
        group_size: Columns that share a scale in a row; -1: all.
        dtype: Type of scales and values.
    """
    work = np.array(matrix, np.float32)
    factors = _inverse_factors(hessian, work)

    def round_group(columns: Floats, grid: _Grid, begin: int) -> Floats:
        """The columns are a view of `work`, whose later columns change."""
        integers = np.empty_like(columns)
        for first in range(0, columns.shape[1], _BLOCK):
            block = columns[:, first : first + _BLOCK]
            errors = np.empty_like(block)
            place = begin + first
            own = factors[place : place + block.shape[1], place : place + block.shape[1]]
            for index in range(block.shape[1]):
                column = block[:, index : index + 1]
                integers[:, first + index : first + index + 1] = code = grid.integers(column)
                error = (column - grid.values(code)) / own[index, index]
                errors[:, index : index + 1] = error
                block[:, index + 1 :] -= error * own[index, index + 1 :]
            end = place + block.shape[1]
            work[:, end:] -= errors @ factors[place:end, end:]
        return integers

    return _round(work, bits, group_size, dtype, round_group)


def _round(
    work: Floats,
    bits: int,
    group_size: int,
    dtype: str,
    round_group: Callable[[Floats, _Grid, int], Floats],
) -> GroupedMatrix:
    num_rows, num_columns = work.shape
    size = num_columns if group_size == -1 else group_size
    codes = np.empty(work.shape, np.uint8)
    grids = []
    for begin in range(0, num_columns, size):
        columns = work[:, begin : begin + size]
        grids.append(grid := _Grid(columns, bits, dtype))
        codes[:, begin : begin + size] = round_group(columns, grid, begin)
    return GroupedMatrix(
        bits,
        (num_rows, num_columns),
        pack_codes(codes, bits),
        np.stack([grid.stored for grid in grids], axis=1),
        np.stack([grid.zeros for grid in grids], axis=1).astype(np.uint8),
        None if num_columns % size == 0 else (np.arange(num_columns) // size).astype(np.int32),
        dtype,
    )


def _inverse_factors(hessian: NDArray[np.float64], work: Floats) -> Floats:
    """U [in, in]; columns of inputs that are always 0 become 0 in the matrix."""
    doubled = 2.0 * hessian
    diagonal = np.diagonal(doubled).copy()
    is_dead = diagonal == 0
    work[:, is_dead] = 0
    diagonal[is_dead] = 1.0
    diagonal += _DAMPING * diagonal.mean()
    np.fill_diagonal(doubled, diagonal)
    inverse = np.linalg.inv(doubled)
    factors: Floats = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
    return np.ascontiguousarray(factors)


def relative_error(matrix: Floats, values: Any) -> float:
    """Root of the mean squared difference, in units of the matrix's own."""
    return float(np.linalg.norm(values - matrix) / max(float(np.linalg.norm(matrix)), 1e-30))
