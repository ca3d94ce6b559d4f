"""Grouped matrices from the tensors of GPTQ, AWQ and compressed-tensors.

    GPTQ                qweight int32 [in * bits / 32, out], the first in the lowest bits, along in
                        qzeros int32 [groups, out * bits / 32], along out; scales [groups, out]; g_idx int32 [in]
    AWQ                 qweight int32 [in, out / 8], qzeros int32 [groups, out / 8]: eight integers of a word are those of
                        the columns 0, 2, 4, 6, 1, 3, 5, 7; scales [groups, out]
    pack-quantized      weight_packed int32 [out, in * bits / 32], along in; weight_scale [out, groups];
                        weight_zero_point int32 [out * bits / 32, groups], along out; weight_g_idx int32 [in]
    int-quantized       weight int8 [out, in], weight_scale and weight_zero_point [out, groups]

GPTQ's first form stores zero points less one. Stored integers of all ones are then one more than a field can hold:
programs read them as 0, as 2^bits or with a carry into the neighbour, so that such files are refused. So are files whose
config.json calls them symmetric while their zero points are not the middle: some programs read what is stored, others take
the middle for granted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.storage.dtypes import as_float32, dtype_name
from finetune.storage.quantisation.grouped_matrix import (
    BITS,
    Bytes,
    GroupedMatrix,
    pack_codes,
    regular_groups,
    unpack_codes,
)
from finetune.storage.quantisation.stored_format import StoredFormat

Parts = Mapping[str, NDArray[Any]]
"""End of the name -> tensor of a layer."""
_WORD = 32
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = ("float32", "float16", "bfloat16")


def read_gptq(name: str, parts: Parts, form: StoredFormat) -> GroupedMatrix:
    """A layer of GPTQ; see the module's text.

    Raises:
        UserError: The tensors do not fit together, or zero points are ambiguous.
    """
    words, stored, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    order = parts.get("g_idx")
    bits = gptq_bits(name, words.shape[0], form, num_columns=None if order is None else order.size)
    num_columns, num_rows, num_groups = words.shape[0] * _WORD // bits, words.shape[1], scales.shape[0]
    check_shapes(
        name,
        {
            "scales": (scales, (num_groups, num_rows)),
            "qzeros": (stored, (num_groups, num_rows * bits // _WORD)),
        },
    )
    zeros = unpack_codes(_bytes_of(stored), bits, num_rows)  # [groups, out]
    if form.form == "gptq":
        _refuse_ambiguous(name, zeros, bits)
        zeros = zeros + np.uint8(1)
    if form.is_symmetric:
        _refuse_unlike(name, zeros, 2 ** (bits - 1), form, said="sym is true")
    groups = _group_of(name, order, num_columns, num_groups, form)
    codes = _bytes_of(np.ascontiguousarray(words.T))
    return grouped(bits, codes, scales.T, zeros.T, groups, num_columns)


def gptq_bits(name: str, num_words: int, form: StoredFormat, *, num_columns: int | None) -> int:
    """Bits of a layer's integers; layers of one model may differ.

    Args:
        name: Of the weight, for messages.
        num_words: Words of 32 bits that its columns take.
        form: What config.json says.
        num_columns: How many they are; None when the file does not tell.

    Raises:
        UserError: They are not 2, 4 or 8.
    """
    if num_columns is None:
        return form.bits
    bits = num_words * _WORD // max(num_columns, 1)
    if bits not in BITS and num_words * _WORD == num_columns * bits and bits < BITS[-1]:
        raise UserError(
            f"{name} has integers of {bits} bits, where {', '.join(map(str, BITS))} are read: give the model that it was "
            "made from"
        )
    check(name, bits in BITS, f"{num_words} words of {_WORD} bits for {num_columns} columns make {bits} bits")
    return bits


def read_awq(name: str, parts: Parts, form: StoredFormat) -> GroupedMatrix:
    """A layer of AWQ; see the module's text.

    Raises:
        UserError: The tensors do not fit together.
    """
    words, stored, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    num_columns, num_rows, num_groups = words.shape[0], words.shape[1] * 8, scales.shape[0]
    check_shapes(
        name,
        {"scales": (scales, (num_groups, num_rows)), "qzeros": (stored, (num_groups, words.shape[1]))},
    )
    groups = _group_of(name, None, num_columns, num_groups, form)
    zeros = _awq_integers(stored)
    if form.is_symmetric:
        _refuse_unlike(name, zeros, 8, form, said="zero_point is false")
    codes = pack_codes(np.ascontiguousarray(_awq_integers(words).T), 4)
    return grouped(4, codes, scales.T, zeros.T, groups, num_columns)


def read_words(name: str, parts: Parts, form: StoredFormat) -> GroupedMatrix:
    """A layer of compressed-tensors in the form "pack-quantized"; see the module's text.

    Raises:
        UserError: The tensors do not fit together.
    """
    bits, words, zeros = form.bits, parts["weight_packed"], parts.get("weight_zero_point")
    num_rows, num_columns = (int(size) for size in parts["weight_shape"].reshape(-1)[:2])
    check_shapes(name, {"weight_packed": (words, (num_rows, -(-num_columns * bits // _WORD)))})
    codes = _bytes_of(words)[:, : -(-num_columns * bits // 8)]
    if zeros is not None and zeros.dtype == np.int8:  # one for all rows is not packed
        zeros = _shifted(name, zeros, bits)
    elif zeros is not None:
        zeros = unpack_codes(_bytes_of(np.ascontiguousarray(zeros.T)), bits, num_rows).T
    return _scaled(name, codes, zeros, parts, form, (num_rows, num_columns))


def read_integers(name: str, parts: Parts, form: StoredFormat) -> GroupedMatrix:
    """A layer of compressed-tensors in the form "int-quantized"; see the module's text.

    Raises:
        UserError: The tensors do not fit together.
    """
    weight, zeros = parts["weight"], parts.get("weight_zero_point")
    codes = pack_codes(_shifted(name, weight, form.bits), form.bits)
    if zeros is not None:
        zeros = _shifted(name, zeros, form.bits)
    return _scaled(name, codes, zeros, parts, form, (weight.shape[0], weight.shape[1]))


def _shifted(name: str, integers: NDArray[Any], bits: int) -> Bytes:
    """Integers around 0 as integers from 0 on."""
    shifted = integers.astype(np.int16) + 2 ** (bits - 1)
    inside = integers.dtype.kind == "i" and (
        not shifted.size or 0 <= shifted.min() <= shifted.max() < 2**bits
    )
    check(name, bool(inside), f"integers of {integers.dtype} do not lie within {bits} bits")
    shifted_bytes: Bytes = shifted.astype(np.uint8)
    return shifted_bytes


def _scaled(
    name: str,
    codes: Bytes,
    zeros: NDArray[Any] | None,
    parts: Parts,
    form: StoredFormat,
    shape: tuple[int, int],
) -> GroupedMatrix:
    """With the scales and groups of compressed-tensors: one for all, one a row, or one a group."""
    num_rows, num_columns = shape
    scales = parts["weight_scale"]
    if scales.size == 1:
        scales = np.broadcast_to(scales.reshape(1, 1), (num_rows, 1))
    scales = scales.reshape(num_rows, -1) if scales.ndim == 1 and scales.size == num_rows else scales
    if zeros is None:
        check(name, form.is_symmetric is not False, "symmetric is false, but there is no weight_zero_point")
        zeros = np.full(scales.shape, 2 ** (form.bits - 1), np.uint8)
    elif zeros.size == 1:
        zeros = np.broadcast_to(zeros.reshape(1, 1), scales.shape)
    zeros = zeros.reshape(scales.shape) if zeros.size == scales.size else zeros
    wanted = (num_rows, scales.shape[-1])
    check_shapes(name, {"weight_scale": (scales, wanted), "weight_zero_point": (zeros, wanted)})
    if form.is_symmetric:
        _refuse_unlike(name, zeros, 2 ** (form.bits - 1), form, said="symmetric is true")
    order = parts.get("weight_g_idx")
    if order is not None and (order < 0).any():  # how that library says that there is no order
        order = None
    groups = _group_of(name, order, num_columns, wanted[1], form)
    return grouped(form.bits, codes, scales, zeros, groups, num_columns)


def grouped(
    bits: int,
    codes: Bytes,
    scales: NDArray[Any],
    zeros: NDArray[Any],
    group_of: NDArray[np.int32] | None,
    num_columns: int,
) -> GroupedMatrix:
    """In arrays of their own, which keep no file mapped."""
    return GroupedMatrix(
        bits,
        (scales.shape[0], num_columns),
        np.array(codes, np.uint8, order="C"),
        np.array(scales, order="C"),
        np.array(zeros, np.uint8, order="C"),
        group_of,
        dtype_name(scales.dtype),
    )


def _bytes_of(words: NDArray[Any]) -> Bytes:
    """int32 [rows, n] -> uint8 [rows, 4 n]: the lowest byte first, as all of these formats count."""
    return np.ascontiguousarray(words).view(np.uint8).reshape(words.shape[0], -1)


def _awq_integers(words: NDArray[Any]) -> Bytes:
    """int32 [n, m / 8] -> uint8 [n, m]."""
    places = unpack_codes(_bytes_of(words), 4, words.shape[1] * 8).reshape(*words.shape, 8)
    integers = np.empty_like(places)
    integers[:, :, _AWQ_COLUMNS] = places
    return integers.reshape(words.shape[0], -1)


def _group_of(
    name: str, order: NDArray[Any] | None, num_columns: int, num_groups: int, form: StoredFormat
) -> NDArray[np.int32] | None:
    """Group of every column: as stored, or so many neighbours each; None where all groups are as wide."""
    if order is None:
        check(
            name,
            not form.is_ordered or num_groups == 1,
            "its columns are in groups by an order (desc_act, actorder), but the file has no g_idx that tells it",
        )
        size = num_columns if form.group_size == -1 or num_groups == 1 else form.group_size
        check(
            name,
            -(-num_columns // size) == num_groups,
            f"{num_columns} columns in groups of {size} have {-(-num_columns // size)} scales, the file {num_groups}",
        )
        order = np.arange(num_columns) // size
    check(name, order.shape == (num_columns,), f"{order.size} columns are in groups, of {num_columns}")
    inside = bool(((order >= 0) & (order < num_groups)).all())
    check(name, inside, f"columns are in groups {order.min()} to {order.max()}, the file has {num_groups}")
    return regular_groups(order.astype(np.int32), num_groups)


def _refuse_ambiguous(name: str, stored: Bytes, bits: int) -> None:
    top = 2**bits - 1
    places = np.argwhere(stored == top)
    if places.size:
        group, row = places[0]
        raise UserError(
            f"{name}: {len(places)} of {stored.size} zero points are stored as {top} (the first in group {group} of "
            f"output {row}), which GPTQ's first form reads as {top + 1}; some programs take that for 0, others for "
            f"{top + 1}. Quantise the model again with checkpoint_format gptq_v2, or give the model that it was made from"
        )


def _refuse_unlike(name: str, zeros: Bytes, middle: int, form: StoredFormat, *, said: str) -> None:
    """Refuses zero points that are not the middle of the integers, where the format says that all are."""
    num_other = int((zeros != middle).sum())
    if num_other:
        raise UserError(
            f"{name}: {num_other} of {zeros.size} zero points are not {middle} (the first of them is "
            f"{zeros[zeros != middle][0]}), although {said} in {form.told_by}: programs differ in which of the two they "
            f"believe. Correct {form.told_by} if the file is right, or give the model that it was made from"
        )


def check_shapes(name: str, wanted: Mapping[str, tuple[NDArray[Any], tuple[int, ...]]]) -> None:
    """Compares the tensors of a layer with the shapes that fit; scales must be finite numbers.

    Args:
        name: Of the weight, for messages.
        wanted: End of the name -> tensor and shape.

    Raises:
        UserError: They do not fit.
    """
    for part, (array, shape) in wanted.items():
        check(name, array.shape == shape, f"{part} is {list(array.shape)}, where {list(shape)} fits")
        if "scale" in part:
            found = dtype_name(array.dtype)
            check(name, found in _FLOATS, f"{part} has element type {found}")
            is_number = np.isfinite(as_float32(array)).all()
            check(name, bool(is_number), f"{part} has values that are no numbers")


def check(name: str, holds: bool, fault: str) -> None:
    """Raises UserError where the tensors of a layer do not fit together."""
    if not holds:
        raise UserError(
            f"{name}: {fault}: the tensors of a quantised layer do not fit together, copy the model again"
        )
