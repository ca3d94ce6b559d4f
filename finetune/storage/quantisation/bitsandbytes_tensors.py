"""Packed matrices from the tensors that bitsandbytes writes.

    weight                    codes, uint8 [n / 2, 1]; other element types hold the same bytes
    weight.absmax             scales of blocks, float32, or uint8 places in a table
    weight.nested_absmax      scales of those, float32
    weight.nested_quant_map   the table, float32 [256]
    weight.quant_map          values of the codes, float32 [16]
    weight.quant_state.*      shape, block sizes, offset and element type, JSON in bytes

Eight bits: weight int8 [out, in] and SCB float32 [out]; weight_format, where there is one, is 0 for rows.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from finetune.errors import UserError
from finetune.storage.quantisation.code_tables import Floats, dynamic_values, four_bit_values
from finetune.storage.quantisation.integer_tensors import Parts
from finetune.storage.quantisation.packed_weights import (
    FourBitMatrix,
    Int8Matrix,
    NestedScales,
)
from finetune.storage.quantisation.scheme import FOUR_BIT
from finetune.storage.quantisation.stored_format import StoredFormat

STATE = "weight.quant_state.bitsandbytes__"
_TYPES = ("float16", "bfloat16", "float32")


class FourBitState(NamedTuple):
    """What stands beside the codes of a matrix in 4 bits.

    Attributes:
        kind: "nf4" or "fp4".
        shape: [out, in].
        block_size: Elements that share a scale.
        dtype: Type that values are rounded to.
        nested_block_size: Scales that share a scale; None without.
        nested_offset: Mean of the scales.
    """

    kind: str
    shape: tuple[int, int]
    block_size: int
    dtype: str
    nested_block_size: int | None
    nested_offset: float


def read_int8(name: str, parts: Parts, form: StoredFormat) -> Int8Matrix:
    """A layer that bitsandbytes quantised to 8 bits; see the module's text.

    Raises:
        UserError: The tensors do not fit together.
    """
    codes, scales = parts["weight"], parts["SCB"].reshape(-1).astype(np.float32)
    if "weight_format" in parts and np.any(parts["weight_format"]):
        raise UserError(
            f"{name} is stored in tiles for one kind of GPU (weight_format {parts['weight_format'].tolist()}), which cannot "
            "be read here: give the model that it was made from"
        )
    if codes.dtype != np.int8 or codes.ndim != 2 or scales.size != codes.shape[0]:
        raise _unfit(name, f"weight is {list(codes.shape)} ({codes.dtype}), SCB {list(scales.shape)}")
    return Int8Matrix(np.array(codes), scales)


def read_four_bit(name: str, parts: Parts, form: StoredFormat) -> FourBitMatrix:
    """A layer that bitsandbytes quantised to 4 bits; see the module's text.

    Raises:
        UserError: The tensors do not fit together, or hold another table of values.
    """
    state = read_state(name, parts)
    codes = np.array(parts["weight"]).reshape(-1).view(np.uint8)
    count = state.shape[0] * state.shape[1]
    if codes.size != -(-count // 2):
        raise _unfit(name, f"{codes.size} bytes hold no matrix of {list(state.shape)}")
    table = parts.get("weight.quant_map")
    if table is not None and not np.allclose(table.reshape(-1), four_bit_values(state.kind), atol=1e-6):
        raise UserError(
            f"{name} has a table of values that is not that of {state.kind}: it cannot be read here"
        )
    scales = _read_scales(name, parts, state)
    num_blocks = scales.codes.size if isinstance(scales, NestedScales) else scales.size
    if num_blocks != -(-count // state.block_size):
        raise _unfit(name, f"{num_blocks} scales for {count} weights in blocks of {state.block_size}")
    return FourBitMatrix(state.kind, state.shape, state.block_size, codes, scales, state.dtype)


def read_state(name: str, parts: Parts) -> FourBitState:
    """What stands beside the codes.

    Raises:
        UserError: It is missing or cannot be read.
    """
    key = next((part for part in parts if part.startswith(STATE)), None)
    if key is None:
        raise _unfit(name, f"it has no {STATE}nf4")
    try:
        stored = json.loads(parts[key].tobytes())
        rows, columns = stored["shape"]
        state = FourBitState(
            stored["quant_type"],
            (int(rows), int(columns)),
            int(stored["blocksize"]),
            stored["dtype"],
            stored.get("nested_blocksize"),
            float(stored.get("nested_offset") or 0.0),
        )
        sizes = (*state.shape, state.block_size, state.nested_block_size or 1)
        if state.kind not in FOUR_BIT or state.dtype not in _TYPES or min(sizes) < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise _unfit(name, f"{key} cannot be read") from None
    return state


def _read_scales(name: str, parts: Parts, state: FourBitState) -> NestedScales | Floats:
    """Scales of blocks, float32 or nested; another table than ours is multiplied out."""
    stored, size = np.array(parts["weight.absmax"]).reshape(-1), state.nested_block_size
    if "weight.nested_absmax" not in parts:
        return stored.astype(np.float32)
    outer = np.array(parts["weight.nested_absmax"], np.float32).reshape(-1)
    if size is None or stored.dtype != np.uint8 or outer.size != -(-stored.size // size):
        raise _unfit(name, f"{outer.size} scales for {stored.size} scales in blocks of {size}")
    table, offset = dynamic_values(), np.float32(state.nested_offset)
    if "weight.nested_quant_map" in parts:
        table = np.array(parts["weight.nested_quant_map"], np.float32).reshape(-1)
    if table.size != 256:
        raise _unfit(name, f"its table of scales has {table.size} values")
    if np.array_equal(table, dynamic_values()):
        return NestedScales(stored, outer, offset, size)
    values: Floats = table[stored] * np.repeat(outer, size)[: stored.size] + offset
    return values


def _unfit(name: str, fault: str) -> UserError:
    return UserError(
        f"{name}: {fault}: the tensors of a quantised layer do not fit together, copy the model again"
    )
