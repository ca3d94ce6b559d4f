"""Packed weights on the device, and the product with one.

    y = x @ W^T,    W [out, in] = table[codes] * scales,    dx = dy @ W

W is computed from its codes in the forward pass and again in the backward pass, in plain Paddle operations on any
device, each in the same memory as the one before: the largest matrix of n elements takes 4n bytes and a few MB, and half
as much again where it is rounded to half precision.

`saved_tensors_hooks` would do the same with less code, but Paddle has one pair of hooks at a time: recompute sets its
own, and leaving ours would unset those.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from finetune.storage.dtypes import to_tensor
from finetune.storage.quantisation.code_tables import dynamic_values, four_bit_values
from finetune.storage.quantisation.grouped_matrix import GroupedMatrix, unpack_codes
from finetune.storage.quantisation.packed_weights import (
    FourBitMatrix,
    Int8Matrix,
    NestedScales,
    PackedMatrix,
    step_sizes,
)

_STRETCH_BYTES = 2**18


_Empty = Callable[[list[int]], Any]
"""Gives float32 memory of a shape, whatever stands in it."""
_workspaces: dict[str, Any] = {}


def _allocate(shape: list[int]) -> Any:
    return paddle.empty(shape, "float32")


def _borrow(shape: list[int]) -> Any:
    """A view of one tensor, as large as the largest that was asked for on this device.

    Memory that is freed and asked for again at other sizes leaves holes, which count as memory of the process.
    """
    place, size = paddle.device.get_device(), math.prod(shape)
    held = _workspaces.get(place)
    if held is None or held.size < size:
        _workspaces.pop(place, None)
        del held
        _workspaces[place] = held = paddle.empty([size], "float32")
    return held._slice(0, size).reshape(shape)


class PackedWeight:
    """The frozen weight of a linear layer.

    Attributes:
        matrix_shape: [out, in] of what is held.
        dtype: Paddle's type that the layer computes in.
        stop_gradient: True: it is never trained.
        is_distributed: Whether it is this tensor rank's part of a larger one.
    """

    stop_gradient = True
    is_distributed = False

    def __init__(self, shape: tuple[int, int], dtype: Any):
        self.matrix_shape = shape
        self.dtype = dtype

    @property
    def shape(self) -> list[int]:
        """[in, out], as Paddle's linear layers have their weights."""
        num_rows, num_columns = self.matrix_shape
        return [num_columns, num_rows]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.matrix_shape[0] * self.matrix_shape[1]

    @property
    def num_bytes(self) -> int:
        """Of everything that is held."""
        return sum(each.size * each.element_size() for each in self._tensors())

    def values(self) -> Any:
        """The matrix [out, in] in `dtype`, rounded once from float32."""
        return self._values(_allocate)

    def borrowed_values(self) -> Any:
        """The same in memory that the next weight's values will be written to: for use at once."""
        return self._values(_borrow)

    def _values(self, empty: _Empty) -> Any:
        with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
            return _converted(self._float32_values(empty), self.dtype)

    def _tensors(self) -> list[Any]:
        raise NotImplementedError

    def _float32_values(self, empty: _Empty) -> Any:
        raise NotImplementedError


class PackedFourBit(PackedWeight):
    """A weight in 4-bit blocks; a short last block is filled up.

    Args:
        matrix: What `pack_matrix` made.
        dtype: Paddle's type that the layer computes in.
    """

    def __init__(self, matrix: FourBitMatrix, dtype: Any):
        super().__init__(matrix.shape, dtype)
        self._kind, self._block_size = matrix.kind, matrix.block_size
        num_blocks = -(-matrix.shape[0] * matrix.shape[1] // matrix.block_size)
        codes = matrix.codes
        if codes.size * 2 < num_blocks * matrix.block_size:
            codes = np.pad(codes, (0, num_blocks * matrix.block_size // 2 - codes.size))
        self._codes = paddle.to_tensor(codes)  # uint8 [blocks * block_size / 2]
        self._scales = _DeviceScales(matrix.scales)
        self._rounded_to = matrix.rounded_to

    def _tensors(self) -> list[Any]:
        return [self._codes, *self._scales.tensors()]

    def _float32_values(self, empty: _Empty) -> Any:
        per_block = self._block_size // 2  # bytes
        num_blocks = self._codes.size // per_block
        values, scales = empty([num_blocks, self._block_size]), self._scales.values().unsqueeze(1)
        table, step = _pair_table(self._kind), max(1, _STRETCH_BYTES // per_block)
        for block in range(0, num_blocks, step):  # places take four bytes for each of the codes
            places = self._codes[block * per_block : (block + step) * per_block].astype("int32")
            part = paddle.gather(table, places).reshape([-1, self._block_size])
            values[block : block + step] = part.multiply_(scales[block : block + step])
        num_rows, num_columns = self.matrix_shape
        flat = values.reshape([-1])
        if flat.size > num_rows * num_columns:
            flat = flat[: num_rows * num_columns]
        flat = flat.reshape([num_rows, num_columns])
        return _converted(flat, getattr(paddle, self._rounded_to)) if self._rounded_to else flat


class _DeviceScales:
    """Scales of 4-bit blocks, as float32 or in 8 bits."""

    def __init__(self, scales: Any):
        self._is_nested = isinstance(scales, NestedScales)
        if not self._is_nested:
            self._plain = paddle.to_tensor(scales)  # float32 [blocks]
            return
        self._num_blocks, self._offset = scales.codes.size, float(scales.offset)
        self._block_size = scales.block_size
        missing = -scales.codes.size % scales.block_size
        self._codes = paddle.to_tensor(np.pad(scales.codes, (0, missing)))  # uint8, whole stretches
        self._outer = paddle.to_tensor(scales.scales)  # float32 [stretches]

    def tensors(self) -> list[Any]:
        return [self._codes, self._outer] if self._is_nested else [self._plain]

    def values(self) -> Any:
        """float32 [blocks]."""
        if not self._is_nested:
            return self._plain
        inner = paddle.gather(_dynamic_table(), self._codes.astype("int32"))
        inner = inner.reshape([-1, self._block_size]) * self._outer.unsqueeze(1)
        return inner.reshape([-1])[: self._num_blocks] + self._offset


class PackedInt8(PackedWeight):
    """A weight in 8 bits with a scale for each row.

    Args:
        matrix: What `pack_matrix` made.
        dtype: Paddle's type that the layer computes in.
    """

    def __init__(self, matrix: Int8Matrix, dtype: Any):
        super().__init__(matrix.shape, dtype)
        self._codes = paddle.to_tensor(matrix.codes)  # int8 [out, in]
        self._steps = paddle.to_tensor(step_sizes(matrix.scales)).unsqueeze(1)  # float32 [out, 1]

    def _tensors(self) -> list[Any]:
        return [self._codes, self._steps]

    def _float32_values(self, empty: _Empty) -> Any:
        values = empty(list(self.matrix_shape))
        step = max(1, _STRETCH_BYTES // max(self.matrix_shape[1], 1))
        for row in range(0, self.matrix_shape[0], step):
            part = self._codes[row : row + step].astype("float32")
            values[row : row + step] = part.multiply_(self._steps[row : row + step])
        return values


class PackedGroups(PackedWeight):
    """A weight of whole integers, with scales and zero points for groups of columns.

    Args:
        matrix: As a reader of a quantised folder gives it.
        dtype: Paddle's type that the layer computes in.
    """

    def __init__(self, matrix: GroupedMatrix, dtype: Any):
        super().__init__(matrix.shape, dtype)
        self._bits = matrix.bits
        self._rounded_to = getattr(paddle, matrix.rounded_to)
        self._codes = paddle.to_tensor(matrix.codes)  # uint8 [out, bytes]
        self._scales = to_tensor(matrix.scales)  # [out, groups]
        self._zeros = paddle.to_tensor(matrix.zeros)  # uint8 [out, groups]
        is_even = matrix.group_of is None
        self._group_of = None if is_even else paddle.to_tensor(matrix.group_of)  # int32 [in]

    def _values(self, empty: _Empty) -> Any:
        """Rounded to the stored type, and then to this one."""
        num_rows, num_columns = shape = list(self.matrix_shape)
        is_plain = self.dtype == paddle.float32
        values = empty(shape) if is_plain else paddle.empty(shape, self.dtype)
        step = max(1, _STRETCH_BYTES // max(num_columns, 1))
        with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
            for row in range(0, num_rows, step):
                part = _converted(self._rows(row, row + step), self._rounded_to)
                values[row : row + step] = _converted(part, self.dtype)
        return values

    def _tensors(self) -> list[Any]:
        own = [self._codes, self._scales, self._zeros]
        return own if self._group_of is None else [*own, self._group_of]

    def _rows(self, begin: int, end: int) -> Any:
        """Some rows, float32 [rows, in]."""
        places = self._codes[begin:end].astype("int32")  # [rows, bytes]
        count, num_columns = places.shape[0], self.matrix_shape[1]
        integers = paddle.gather(_integer_table(self._bits), places.flatten())  # [rows * bytes, 8 / bits]
        integers = integers.reshape([count, -1])
        if integers.shape[1] > num_columns:
            integers = integers[:, :num_columns]
        scales, zeros = (each[begin:end].astype("float32") for each in (self._scales, self._zeros))
        if self._group_of is not None:
            scales, zeros = (paddle.index_select(each, self._group_of, axis=1) for each in (scales, zeros))
            return integers.subtract_(zeros).multiply_(scales)
        groups = integers.reshape([count, scales.shape[1], -1])
        groups = groups.subtract_(zeros.unsqueeze(-1)).multiply_(scales.unsqueeze(-1))
        return groups.reshape([count, num_columns])


def to_device(matrix: PackedMatrix, dtype: Any) -> PackedWeight:
    """A packed matrix as a layer's weight."""
    if isinstance(matrix, GroupedMatrix):
        return PackedGroups(matrix, dtype)
    if isinstance(matrix, FourBitMatrix):
        return PackedFourBit(matrix, dtype)
    return PackedInt8(matrix, dtype)


@functools.cache
def _pair_table(kind: str) -> Any:
    """The two values of every byte, float32 [256, 2]."""
    values, bytes_ = four_bit_values(kind), np.arange(256)
    return paddle.to_tensor(np.stack([values[bytes_ >> 4], values[bytes_ & 15]], axis=-1))


@functools.cache
def _integer_table(bits: int) -> Any:
    """The integers of every byte, float32 [256, 8 / bits]."""
    integers = unpack_codes(np.arange(256, dtype=np.uint8)[:, None], bits, 8 // bits)
    return paddle.to_tensor(integers.astype(np.float32))


@functools.cache
def _dynamic_table() -> Any:
    return paddle.to_tensor(dynamic_values())


class _PackedProduct(PyLayer):  # type: ignore[misc]
    """x @ W^T with W computed where it is used."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: PackedWeight) -> Any:
        ctx.weight, ctx.dtype = weight, x.dtype
        return paddle.matmul(x, weight.borrowed_values(), transpose_y=True)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        product = paddle.matmul(gradient, _converted(ctx.weight.borrowed_values(), gradient.dtype))
        return _converted(product, ctx.dtype)


def _converted(tensor: Any, dtype: Any) -> Any:
    """The tensor in a type; Paddle copies one that has it already."""
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)


def packed_linear(x: Any, weight: PackedWeight, bias: Any = None, name: Any = None) -> Any:
    """What `paddle.nn.functional.linear` computes, with a packed weight.

    Args:
        x: [..., in].
        weight: The packed weight.
        bias: [out], or None.
        name: Not used; Paddle's layers give it.
    """
    product = _PackedProduct.apply(x, weight)
    return product if bias is None else product + bias.astype(product.dtype)
