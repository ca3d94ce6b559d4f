"""Packed matrices as the tensors of a layer in files that other tools read: the inverse of the readers.

Integers are written in the forms of compressed-tensors, nf4 in bitsandbytes'.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.storage.dtypes import Array
from finetune.storage.quantisation.code_tables import four_bit_values
from finetune.storage.quantisation.grouped_matrix import GroupedMatrix, pack_codes, unpack_codes
from finetune.storage.quantisation.packed_weights import FourBitMatrix, NestedScales, PackedMatrix
from finetune.storage.quantisation.stored_format import BITSANDBYTES, COMPRESSED, INTEGER_FORM, PACKED_FORM

_WORD_BYTES = 4


def stored_parts(packed: PackedMatrix, *, dtype: str) -> dict[str, Array]:
    """End of the name -> tensor of a layer.

    Args:
        packed: Its weight: integers of 4 or 8 bits, or nf4 with float32 scales.
        dtype: Type that values are rounded to.
    """
    if isinstance(packed, FourBitMatrix):
        return _four_bit_parts(packed, dtype)
    assert isinstance(packed, GroupedMatrix)
    if packed.bits == 8:
        integers = (packed.codes.astype(np.int16) - 128).astype(np.int8)
        return {"weight": integers, "weight_scale": packed.scales}
    return {
        "weight_packed": _words(packed.codes),
        "weight_scale": packed.scales,
        "weight_shape": np.array(packed.shape, np.int64),
        "weight_zero_point": np.ascontiguousarray(_words(pack_codes(packed.zeros.T, packed.bits)).T),
    }


def format_facts(packed: PackedMatrix, *, group_size: int, head: str) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear layers are packed like one of them.

    Args:
        packed: Its weight.
        group_size: Columns that share a scale; -1: all.
        head: Name of the output layer, which stays as it is.
    """
    if isinstance(packed, FourBitMatrix):
        return {
            "quant_method": BITSANDBYTES,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": packed.kind,
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
        }
    assert isinstance(packed, GroupedMatrix)
    is_byte = packed.bits == 8
    weights = {
        "num_bits": packed.bits,
        "type": "int",
        "symmetric": is_byte,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": COMPRESSED,
        "format": INTEGER_FORM if is_byte else PACKED_FORM,
        "config_groups": {"group_0": scheme},
        "ignore": [head],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }


def _words(packed: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Bytes [rows, n] as words [rows, ceil(n / 4)]."""
    missing = -packed.shape[1] % _WORD_BYTES
    filled = np.ascontiguousarray(np.pad(packed, ((0, 0), (0, missing))))
    return filled.view(np.int32)


def _four_bit_parts(packed: FourBitMatrix, dtype: str) -> dict[str, Array]:
    assert not isinstance(packed.scales, NestedScales)
    state = {
        "quant_type": packed.kind,
        "blocksize": packed.block_size,
        "dtype": dtype,
        "shape": list(packed.shape),
    }
    return {
        "weight": packed.codes[:, None],
        "weight.absmax": packed.scales,
        "weight.quant_map": four_bit_values(packed.kind),
        f"weight.quant_state.bitsandbytes__{packed.kind}": np.frombuffer(
            json.dumps(state).encode(), np.uint8
        ),
    }


def row_integers(
    packed: PackedMatrix,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32] | None]:
    """Integers [out, in], scales and zero points [out, groups], each group as many neighbours of a row as the next.

    Args:
        packed: As `round_nearest` or `round_by_gptq` makes it in even groups; or nf4 whose blocks lie within rows.
    """
    num_rows, num_columns = packed.shape
    if isinstance(packed, FourBitMatrix):
        pairs = np.stack([packed.codes >> 4, packed.codes & 15], axis=-1).reshape(-1)
        scales = packed.scale_values().reshape(num_rows, -1)
        return pairs[: num_rows * num_columns].reshape(packed.shape).astype(np.uint8), scales, None
    assert isinstance(packed, GroupedMatrix)
    integers = unpack_codes(packed.codes, packed.bits, num_columns)
    return integers, packed.scales.astype(np.float32), packed.zeros.astype(np.float32)
