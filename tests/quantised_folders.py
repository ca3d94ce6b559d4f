"""Writes folders as bitsandbytes, AutoGPTQ, AutoAWQ, compressed-tensors and PaddleNLP do, by definitions of its own.

Weights are rounded to the nearest integer; what they stand for is worked out here too, element by element, so that the
readers can be compared with it.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from finetune.families.family import find_family
from finetune.models.hf_names import is_tied, is_turned, to_hugging_face

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of a word's eight, from the lowest four bits up."""
_LINEAR = re.compile(r"(proj|fc[12]|dense\w*|query_key_value|c_attn|w[12])\.weight$")


def pack_rows(integers: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """[n, m] -> int32 [n * bits / 32, m], the first in the lowest bits; n is filled up with zeros."""
    per_word = 32 // bits
    integers = np.pad(integers, ((0, -len(integers) % per_word), (0, 0))).astype(np.uint32)
    words = np.zeros((len(integers) // per_word, integers.shape[1]), np.uint32)
    for place in range(per_word):
        words |= integers[place::per_word] << np.uint32(bits * place)
    return words.view(np.int32)


def pack_columns(integers: NDArray[Any], bits: int) -> NDArray[np.int32]:
    return np.ascontiguousarray(pack_rows(integers.T, bits).T)


def pack_awq(integers: NDArray[Any]) -> NDArray[np.int32]:
    """[n, m] -> int32 [n, m / 8]."""
    words = np.zeros((len(integers), integers.shape[1] // 8), np.uint32)
    for place, column in enumerate(AWQ_ORDER):
        words |= integers[:, column::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


class Rounded:
    """Integers of a matrix [in, out] in groups along the input, and what they stand for.

    Attributes:
        integers: [in, out].
        zeros: [groups, out].
        scales: float16 [groups, out].
        groups: Group of every input, [in].
        values: float16 [in, out].
    """

    def __init__(
        self, weight: NDArray[Any], bits: int, size: int, *, symmetric: bool, order: NDArray[Any] | None
    ):
        size = weight.shape[0] if size == -1 else size
        self.groups = np.arange(weight.shape[0]) // size if order is None else order // size
        top, num_groups = 2**bits - 1, int(self.groups.max()) + 1
        self.scales = np.empty((num_groups, weight.shape[1]), np.float16)
        self.zeros = np.empty((num_groups, weight.shape[1]), np.int64)
        for group in range(num_groups):
            part = weight[self.groups == group]
            low, high = np.minimum(part.min(0), -1e-4), np.maximum(part.max(0), 1e-4)
            if symmetric:
                self.scales[group] = np.maximum(-low, high) * 2 / top
                self.zeros[group] = (top + 1) // 2
            else:
                self.scales[group] = (high - low) / top
                self.zeros[group] = np.clip(np.rint(-low / self.scales[group].astype(np.float32)), 1, top)
        scales = self.scales.astype(np.float32)[self.groups]
        self.integers = np.clip(np.rint(weight / scales) + self.zeros[self.groups], 0, top).astype(np.int64)
        self.values = (scales * (self.integers - self.zeros[self.groups])).astype(np.float16)


def gptq_layer(
    weight: NDArray[Any],
    bits: int,
    size: int,
    *,
    version: int = 1,
    act_order: bool = False,
    symmetric: bool = False,
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float16]]:
    """Tensors of a layer, and what they stand for [in, out]."""
    order = np.random.default_rng(1).permutation(weight.shape[0]) if act_order else None
    made = Rounded(weight, bits, size, symmetric=symmetric, order=order)
    return {
        "qweight": pack_rows(made.integers, bits),
        "qzeros": pack_columns(made.zeros - (version == 1), bits),
        "scales": made.scales,
        "g_idx": made.groups.astype(np.int32),
    }, made.values


def awq_layer(weight: NDArray[Any], size: int) -> tuple[dict[str, NDArray[Any]], NDArray[np.float16]]:
    made = Rounded(weight, 4, size, symmetric=False, order=None)
    parts = {"qweight": pack_awq(made.integers), "qzeros": pack_awq(made.zeros), "scales": made.scales}
    return parts, made.values


def compressed_layer(
    weight: NDArray[Any],
    bits: int,
    size: int,
    *,
    packed: bool = True,
    symmetric: bool = True,
    act_order: bool = False,
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float16]]:
    order = np.random.default_rng(1).permutation(weight.shape[0]) if act_order else None
    made, middle = Rounded(weight, bits, size, symmetric=symmetric, order=order), 2 ** (bits - 1)
    parts = {"weight_scale": np.ascontiguousarray(made.scales.T)}
    if packed:
        parts["weight_packed"] = pack_columns(made.integers.T, bits)
        parts["weight_shape"] = np.array(weight.shape[::-1], np.int64)
    else:
        parts["weight"] = np.ascontiguousarray((made.integers - middle).T.astype(np.int8))
    if not symmetric:
        zeros = np.ascontiguousarray(made.zeros.T)
        parts["weight_zero_point"] = pack_rows(zeros, bits) if packed else (zeros - middle).astype(np.int8)
    if act_order:
        parts["weight_g_idx"] = made.groups.astype(np.int32)
    return parts, made.values


def paddlenlp_layer(weight: NDArray[Any]) -> tuple[dict[str, NDArray[Any]], NDArray[np.float16]]:
    """PaddleNLP's llm.int8."""
    scales = (np.abs(weight).max(0) / 127).astype(np.float16)
    integers = np.rint(weight / scales.astype(np.float32)).astype(np.int8)
    values = (integers * scales.astype(np.float32)).astype(np.float16)
    return {"quant_weight": np.ascontiguousarray(integers.T), "quant_scale": scales}, values


def bitsandbytes_layer(
    weight: NDArray[Any],
    kind: str,
    *,
    double: bool = False,
    dtype: str = "float16",
    offset: float | None = None,
) -> tuple[dict[str, NDArray[Any]], NDArray[Any]]:
    """Four bits by this project's packing, whose bytes tests/reference compares with bitsandbytes'."""
    from finetune.storage.quantisation.code_tables import dynamic_values, four_bit_values
    from finetune.storage.quantisation.packed_weights import nest_scales, pack_matrix
    from finetune.storage.quantisation.scheme import QuantisationScheme

    packed = pack_matrix(weight.T, QuantisationScheme(algorithm=kind, double_quant=double), name="layer")
    if offset is not None:
        plain = pack_matrix(weight.T, QuantisationScheme(algorithm=kind), name="layer")
        packed = replace(packed, scales=nest_scales(plain.scales, 256, offset=np.float32(offset)))
    if kind == "llm.int8":
        return {"weight": packed.codes, "SCB": packed.scales}, packed.values().T
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": 64,
        "dtype": dtype,
        "shape": list(packed.shape),
    }
    parts = {"weight": packed.codes[:, None], "weight.quant_map": four_bit_values(kind)}
    if double:
        nested = packed.scales
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(nested.offset)}
        parts |= {
            "weight.absmax": nested.codes,
            "weight.nested_absmax": nested.scales,
            "weight.nested_quant_map": dynamic_values(),
        }
    else:
        parts["weight.absmax"] = packed.scales
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return parts, packed.values().T.astype(dtype)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def _compressed_facts(bits: int, size: int, form: str, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": bits, "type": "int", "strategy": "channel" if size == -1 else "group",
              "group_size": None if size == -1 else size, "symmetric": True, **weights}  # fmt: skip
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "quantization_status": "compressed"}  # fmt: skip


KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "gptq": (GPTQ, lambda weight: gptq_layer(weight, 4, 32)),
    "gptq rows": (GPTQ | {"group_size": -1, "bits": 8}, lambda weight: gptq_layer(weight, 8, -1)),
    "gptq order": (GPTQ | {"desc_act": True}, lambda weight: gptq_layer(weight, 4, 32, act_order=True)),
    "gptq_v2": (
        GPTQ | {"checkpoint_format": "gptq_v2", "bits": 2},
        lambda weight: gptq_layer(weight, 2, 32, version=2),
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        lambda weight: awq_layer(weight, 32),
    ),
    "compressed int4": (
        _compressed_facts(4, 32, "pack-quantized"),
        lambda weight: compressed_layer(weight, 4, 32),
    ),
    "compressed zero points": (
        _compressed_facts(4, 32, "pack-quantized", symmetric=False),
        lambda weight: compressed_layer(weight, 4, 32, symmetric=False, act_order=True),
    ),
    "compressed int8": (
        _compressed_facts(8, -1, "int-quantized"),
        lambda weight: compressed_layer(weight, 8, -1, packed=False),
    ),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        lambda weight: bitsandbytes_layer(weight, "nf4", double=True),
    ),
    "int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda weight: bitsandbytes_layer(weight, "llm.int8"),
    ),
}
"""Name -> quantization_config, and what makes the tensors of a weight [in, out] and their values."""


def write_hugging_face(base: Path, folder: Path, dtype: str = "float32") -> Path:
    """A model of PaddleNLP's form in Hugging Face's, with everything else that the folder holds."""
    config = json.loads((base / "config.json").read_text())
    family = find_family(config)
    tied = is_tied(config, family)
    tensors = {}
    for name, array in load_file(base / "model.safetensors").items():
        turned = is_turned(name, array.shape, family, tied=tied)
        value = np.ascontiguousarray(array.T if turned else array).astype(dtype)
        tensors[to_hugging_face(name, family)] = value
    shutil.copytree(base, folder)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_quantised(base: Path, folder: Path, kind: str, layers: re.Pattern[str] = _LINEAR) -> Path:
    """Writes a model in Hugging Face's form quantised, and beside it, as `<folder>-values`, what that stands for.

    Args:
        base: With Hugging Face's names.
        folder: To make.
        kind: Of `KINDS`.
        layers: Names of the weights that are quantised.
    """
    facts, quantise = KINDS[kind]
    values = Path(f"{folder}-values")
    for target in (folder, values):
        shutil.copytree(base, target)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": facts}
    (folder / "config.json").write_text(json.dumps(config))
    packed, plain = {}, {}
    for name, array in load_file(base / "model.safetensors").items():
        plain[name] = packed[name] = array
        if layers.search(name):
            parts, stands_for = quantise(np.ascontiguousarray(array.T, np.float32))
            del packed[name]
            packed |= {
                f"{name.removesuffix('weight')}{end}": np.ascontiguousarray(part)
                for end, part in parts.items()
            }
            plain[name] = np.ascontiguousarray(stands_for.T.astype(np.float32))
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, values / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_paddlenlp(base: Path, folder: Path) -> Path:
    """Writes a model in PaddleNLP's form as its llm.int8 stores it, and beside it, as `<folder>-values`, what that stands for."""
    values = Path(f"{folder}-values")
    for target in (folder, values):
        shutil.copytree(base, target)
    config = json.loads((base / "config.json").read_text())
    facts = {"quantization_config": {"weight_quantize_algo": "llm.int8"}}
    (folder / "config.json").write_text(json.dumps(config | facts))
    family = find_family(config)
    packed, plain = {}, {}
    for name, array in load_file(base / "model.safetensors").items():
        plain[name] = packed[name] = array
        if array.ndim == 2 and _LINEAR.search(to_hugging_face(name, family)):
            parts, stands_for = paddlenlp_layer(array)
            del packed[name]
            packed |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
            plain[name] = stands_for.astype(np.float32)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pd"})
    save_file(plain, values / "model.safetensors", metadata={"format": "pd"})
    return folder
