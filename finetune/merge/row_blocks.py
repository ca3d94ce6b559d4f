"""Weights that are changed on their way from file to file, a few rows at a time.

A matrix (or a vector) is a `ComputedTensor` that hands out its rows in blocks; the functions here make one from
another: turned, with columns chosen, with rows for new tokens, with a low-rank update. A block is about a megabyte of
float32, so that it stays in a core's cache through all steps; A and B of one layer are all that is held beside it.
NumPy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.merge.kronecker_update import KroneckerUpdate
from finetune.storage.dtypes import BFLOAT16, add_bfloat16, as_float32, num_bytes, rounded
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.quantisation.packed_weights import pack_matrix
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.storage.quantisation.stored_tensors import PackedTensor
from finetune.storage.writer import ComputedTensor

_BLOCK_ITEMS = 2**18


@dataclass(frozen=True)
class Update:
    """What is added to a weight: left @ right.

    Attributes:
        shape: Of the weight.
        factors: Reads left [rows, r] and right [r, columns], float32.
        path: The adapter's file, for messages.
        lengths: Reads the trained lengths of the updated weight's columns, float32; None where they are as they come.
        is_turned: Whether these are the lengths of rows, because the weight is turned.
    """

    shape: tuple[int, int]
    factors: Callable[[], tuple[NDArray[Any], NDArray[Any]]]
    path: Path
    lengths: Callable[[], NDArray[Any]] | None = None
    is_turned: bool = False

    def turned(self) -> Update:
        """The update of the transposed weight."""

        def factors() -> tuple[NDArray[Any], NDArray[Any]]:
            left, right = self.factors()
            return np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)

        shape = (self.shape[1], self.shape[0])
        return replace(self, shape=shape, factors=factors, is_turned=not self.is_turned)

    def columns(self, chosen: NDArray[Any]) -> Update:
        """The update of some columns of the weight."""

        def factors() -> tuple[NDArray[Any], NDArray[Any]]:
            left, right = self.factors()
            return left, np.ascontiguousarray(right[:, chosen])

        read = self.lengths
        lengths = None if read is None else lambda: np.ascontiguousarray(read()[chosen])
        return replace(self, shape=(self.shape[0], len(chosen)), factors=factors, lengths=lengths)


AnyUpdate = Update | KroneckerUpdate


def stored_rows(tensor: JoinedTensor) -> ComputedTensor:
    """A tensor as its file has it; one that ranks share is joined in memory first, a packed one dequantised."""

    def blocks() -> Iterator[NDArray[Any]]:
        if len(tensor.parts) > 1 or isinstance(tensor, PackedTensor):
            yield from _cut(tensor.load())
            return
        row_shape = tensor.shape[1:]
        block_bytes = _rows_per_block(tensor.shape) * num_bytes(tensor.dtype, row_shape)
        for content in tensor.parts[0].blocks(max(block_bytes, 1)):
            yield content.view(tensor.dtype).reshape(-1, *row_shape)

    return ComputedTensor(tensor.name, tensor.dtype, tensor.shape, blocks)


def turned_rows(rows: ComputedTensor) -> ComputedTensor:
    """The transpose of a matrix, which is held in memory meanwhile."""
    return replace(rows, shape=rows.shape[::-1], blocks=lambda: _cut(whole(rows).T))


def whole(rows: ComputedTensor) -> NDArray[Any]:
    """All rows in memory."""
    array, begin = np.empty(rows.shape, rows.dtype), 0
    for block in rows.blocks():
        array[begin : begin + len(block)] = block
        begin += len(block)
    return array


def chosen_columns(rows: ComputedTensor, chosen: NDArray[Any]) -> ComputedTensor:
    """Some columns of a matrix, or some elements of a vector."""
    if len(rows.shape) == 1:
        return replace(rows, shape=(len(chosen),), blocks=lambda: iter([whole(rows)[chosen]]))
    shape = rows.shape[0], len(chosen)
    return replace(rows, shape=shape, blocks=lambda: (block[:, chosen] for block in rows.blocks()))


def grown_rows(rows: ComputedTensor, size: int) -> ComputedTensor:
    """More rows at the end, each the mean of the others (see `finetune.models.vocabulary`)."""

    def blocks() -> Iterator[NDArray[Any]]:
        total = np.zeros(rows.shape[1:], np.float64)
        for block in rows.blocks():
            total += as_float32(block).sum(axis=0, dtype=np.float64)
            yield block
        mean = rounded((total / rows.shape[0]).astype(np.float32), rows.dtype)
        step = _rows_per_block(rows.shape)
        for begin in range(rows.shape[0], size, step):
            yield np.broadcast_to(mean, (min(step, size - begin), *rows.shape[1:]))

    return replace(rows, shape=(size, *rows.shape[1:]), blocks=blocks)


def grown_columns(rows: ComputedTensor, size: int) -> ComputedTensor:
    """The same for columns of a matrix."""

    def blocks() -> Iterator[NDArray[Any]]:
        for block in rows.blocks():
            mean = as_float32(block).mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
            added = np.repeat(rounded(mean, rows.dtype), size - rows.shape[1], axis=1)
            yield np.concatenate([block, added], axis=1)

    return replace(rows, shape=(rows.shape[0], size), blocks=blocks)


def converted_rows(rows: ComputedTensor, dtype: np.dtype[Any]) -> ComputedTensor:
    """Another element type."""
    if rows.dtype == dtype:
        return rows
    return replace(
        rows, dtype=dtype, blocks=lambda: (rounded(as_float32(block), dtype) for block in rows.blocks())
    )


def quantised_rows(rows: ComputedTensor, scheme: QuantisationScheme, *, is_turned: bool) -> ComputedTensor:
    """What a matrix stands for once it was quantised; the matrix is held in memory meanwhile.

    Args:
        rows: The matrix.
        scheme: How it was quantised.
        is_turned: Whether it is stored as [out, in].
    """

    def blocks() -> Iterator[NDArray[Any]]:
        matrix = whole(rows)
        values = pack_matrix(matrix if is_turned else matrix.T, scheme, name=rows.name).values()
        yield from _cut(values if is_turned else values.T)

    return replace(rows, dtype=np.dtype(np.float32), blocks=blocks)


def updated_rows(rows: ComputedTensor, updates: Sequence[AnyUpdate], *, sign: float = 1.0) -> ComputedTensor:
    """W + left @ right of all updates, or their Kronecker products, in float32, rounded once to the weight's type.

    Raises:
        UserError: While blocks are made: an adapter holds values that are not finite, or a sum is beyond float16.
    """

    def blocks() -> Iterator[NDArray[Any]]:
        low = [finite_factors(each) for each in updates if isinstance(each, Update)]
        readers = [each.rows_reader() for each in updates if isinstance(each, KroneckerUpdate)]
        none = np.zeros((rows.shape[0], 0), np.float32), np.zeros((0, rows.shape[1]), np.float32)
        low = low or [none]
        left = np.ascontiguousarray(np.concatenate([pair[0] for pair in low], axis=1) * np.float32(sign))
        right = np.ascontiguousarray(np.concatenate([pair[1] for pair in low], axis=0))
        product, wide = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint32)
        begin = 0
        for block in rows.blocks():
            count = len(block)
            if count > len(product):
                product = np.empty((count, rows.shape[1]), np.float32)
                wide = np.empty((count, rows.shape[1]), np.uint32)
            total = np.matmul(left[begin : begin + count], right, out=product[:count])
            for read in readers:
                total += np.float32(sign) * read(begin, count)
            begin += count
            yield _added(block, total, wide[:count], updates[0].path)

    return replace(rows, blocks=blocks)


def scaled_rows(rows: ComputedTensor, update: AnyUpdate) -> ComputedTensor:
    """A weight with one update whose columns get their trained lengths (DoRA), rounded once to the weight's type."""
    assert isinstance(update, Update)
    wide = updated_rows(converted_rows(rows, np.dtype(np.float32)), [update])

    def blocks() -> Iterator[NDArray[Any]]:
        assert update.lengths is not None
        lengths = update.lengths()
        if not np.isfinite(lengths).all():
            raise UserError(
                f"{update.path} holds values that are not finite: the training diverged. Merge an earlier checkpoint"
            )
        if not update.is_turned:
            squares = np.zeros(rows.shape[1], np.float64)
            for block in wide.blocks():
                squares += np.square(block, dtype=np.float64).sum(axis=0)
            factors = (lengths / np.sqrt(squares)).astype(np.float32)
        begin = 0
        for block in wide.blocks():
            if update.is_turned:
                own = np.sqrt(np.square(block, dtype=np.float64).sum(axis=1, keepdims=True))
                scaled = block * (lengths[begin : begin + len(block), None] / own).astype(np.float32)
            else:
                scaled = block * factors
            begin += len(block)
            yield rounded(scaled, rows.dtype)

    return replace(rows, blocks=blocks)


def finite_factors(update: Update) -> tuple[NDArray[Any], NDArray[Any]]:
    """Left and right of an update.

    Raises:
        UserError: Not all values are finite.
    """
    left, right = update.factors()
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise UserError(
            f"{update.path} holds values that are not finite: the training diverged. Merge an earlier checkpoint"
        )
    return left, right


def _added(block: NDArray[Any], total: NDArray[Any], wide: NDArray[Any], path: Path) -> NDArray[Any]:
    """The block plus `total`, in the block's type; `total` and `wide` are overwritten."""
    if block.dtype == BFLOAT16:
        return add_bfloat16(total, block, wide)
    np.add(total, block, out=total, casting="same_kind")
    if block.dtype == np.float32:
        return total
    with np.errstate(over="ignore"):
        result = total.astype(block.dtype)
    if not np.isfinite(result).all():
        raise UserError(
            f"{path}: with this adapter weights go beyond what float16 can hold: convert the base to bfloat16 first"
        )
    return result


def _cut(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    step = _rows_per_block(array.shape)
    for begin in range(0, array.shape[0], step):
        yield np.ascontiguousarray(array[begin : begin + step])


def _rows_per_block(shape: tuple[int, ...]) -> int:
    return max(1, _BLOCK_ITEMS // max(1, int(np.prod(shape[1:], dtype=np.int64))))
