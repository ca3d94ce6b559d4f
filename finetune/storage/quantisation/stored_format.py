"""How the weights of a folder are quantised, by the `quantization_config` of its config.json.

    bitsandbytes          nf4, fp4 and 8 bits as transformers saves them
    gptq                  GPTQ of AutoGPTQ and GPTQModel, first and second form
    awq                   AWQ of AutoAWQ, form "gemm"
    compressed-tensors    whole integers in the forms "pack-quantized" and "int-quantized"
    paddlenlp             8 bits by PaddleNLP's `llm.int8`

Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import UserError
from finetune.storage.quantisation.grouped_matrix import BITS

BITSANDBYTES, GPTQ, AWQ, COMPRESSED = "bitsandbytes", "gptq", "awq", "compressed-tensors"
PADDLENLP = "paddlenlp"
PACKED_FORM, INTEGER_FORM = "pack-quantized", "int-quantized"
CONFIG_FIELDS = ("quantization_config", "compression_config")
_REMEDY = "give the folder of the model that it was made from, in float32, float16 or bfloat16"
_HALF_TYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class StoredFormat:
    """What is known of a folder's packed weights before they are opened.

    Attributes:
        method: `BITSANDBYTES`, `GPTQ`, `AWQ`, `COMPRESSED` or `PADDLENLP`.
        label: For a person.
        bits: Of an integer, where the files do not tell.
        group_size: Columns that share a scale, where the files do not tell; -1: all.
        form: Of the layouts that a method has.
        dtype: Type of the model's other weights.
    """

    method: str
    label: str
    bits: int
    group_size: int = -1
    form: str = ""
    dtype: str = "float16"


def stored_format(config: Mapping[str, Any], folder: object) -> StoredFormat | None:
    """How the weights are quantised; None where they are not.

    Args:
        config: config.json of a model folder.
        folder: Where it is, for messages.

    Raises:
        UserError: In a way that is not read here.
    """
    facts: Mapping[str, Any] = next(
        (config[name] for name in CONFIG_FIELDS if isinstance(config.get(name), dict)), {}
    )
    method = facts.get("quant_method")
    if not method and (facts.get("load_in_4bit") or facts.get("load_in_8bit")):
        method = BITSANDBYTES
    if not method and facts.get("config_groups"):
        method = COMPRESSED
    own = facts.get("weight_quantize_algo") or facts.get("quant_type")
    if not method and not own:  # PaddleNLP writes the object into every config.json
        if bits := facts.get("bits"):
            raise _refused(folder, "method unnamed", f"{bits} bits in a way that it does not name")
        return None
    dtype = config.get("torch_dtype") or config.get("dtype")
    dtype = dtype if dtype in _HALF_TYPES else "float16"
    if not method:
        return _paddlenlp(folder, str(own), dtype)
    if not isinstance(method, str) or method not in _FORMATS:
        bits = facts.get("bits") or facts.get("num_bits") or facts.get("nbits")
        raise _refused(folder, str(method), f"the method {method}{f', {bits} bits' if bits else ''}")
    return _FORMATS[method](facts, folder, dtype)


def without_format(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model with ordinary weights."""
    return {name: value for name, value in config.items() if name not in CONFIG_FIELDS}


def _refused(folder: object, what: str, detail: str) -> UserError:
    return UserError(
        f"model {folder} is quantised (quantization_config of its config.json: {what}): {detail}, which cannot be "
        f"read here; {_REMEDY}"
    )


def _paddlenlp(folder: object, algorithm: str, dtype: str) -> StoredFormat:
    if algorithm == "llm.int8":
        return StoredFormat(method=PADDLENLP, label="PaddleNLP's llm.int8", bits=8, dtype=dtype)
    why = {
        "weight_only_int8": "its bytes lie in an order of the GPU that wrote them",
        "weight_only_int4": "its bytes lie in an order of the GPU that wrote them",
        "nf4": "its bytes are written by a GPU operator alone, and their order is not on record",
        "fp4": "its bytes are written by a GPU operator alone, and their order is not on record",
    }.get(algorithm, "a form of PaddleNLP's with quantised activations")
    raise _refused(folder, algorithm, f"PaddleNLP's {algorithm}: {why}")


def _bitsandbytes(facts: Mapping[str, Any], folder: object, dtype: str) -> StoredFormat:
    if facts.get("load_in_4bit"):
        kind = facts.get("bnb_4bit_quant_type", "fp4")
        double = ", scales in 8 bits" if facts.get("bnb_4bit_use_double_quant") else ""
        return StoredFormat(
            method=BITSANDBYTES, label=f"bitsandbytes' {kind}{double}", bits=4, form=str(kind), dtype=dtype
        )
    if facts.get("load_in_8bit"):
        return StoredFormat(method=BITSANDBYTES, label="bitsandbytes' 8 bits", bits=8, dtype=dtype)
    raise _refused(folder, BITSANDBYTES, "bitsandbytes with neither load_in_4bit nor load_in_8bit")


def _check_bits(facts: Mapping[str, Any], folder: object, method: str, allowed: tuple[int, ...]) -> int:
    bits = facts.get("bits", facts.get("w_bit"))
    if isinstance(bits, bool) or bits not in allowed:
        listed = " or ".join(map(str, allowed))
        raise _refused(
            folder, f"{method}, {bits} bits", f"{method} in {bits!r} bits, where {listed} are known"
        )
    return int(bits)


def _group_size(facts: Mapping[str, Any], folder: object, method: str) -> int:
    size = facts.get("group_size", facts.get("q_group_size", -1))
    size = -1 if size is None else size
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise _refused(folder, f"{method}, group_size {size!r}", f"{method} in groups of {size!r}")
    return size


def _grouped_label(name: str, bits: int, size: int) -> str:
    return f"{name}, {bits} bits, {'whole rows' if size == -1 else f'groups of {size}'}"


def _gptq(facts: Mapping[str, Any], folder: object, dtype: str) -> StoredFormat:
    bits, size = _check_bits(facts, folder, GPTQ, BITS), _group_size(facts, folder, GPTQ)
    form = facts.get("checkpoint_format") or ("marlin" if facts.get("is_marlin_format") else "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise _refused(folder, f"gptq, checkpoint_format {form}", f"GPTQ in the form {form!r}")
    label = _grouped_label("GPTQ" if form == "gptq" else "GPTQ v2", bits, size)
    return StoredFormat(method=GPTQ, label=label, bits=bits, group_size=size, form=form, dtype=dtype)


def _awq(facts: Mapping[str, Any], folder: object, dtype: str) -> StoredFormat:
    form = str(facts.get("version", facts.get("checkpoint_format", "gemm"))).lower()
    if form != "gemm":
        raise _refused(folder, f"awq, version {form}", f"AWQ in the form {form!r}")
    bits, size = _check_bits(facts, folder, AWQ, (4,)), _group_size(facts, folder, AWQ)
    label = _grouped_label("AWQ", bits, size)
    return StoredFormat(method=AWQ, label=label, bits=bits, group_size=size, form=form, dtype=dtype)


def _compressed(facts: Mapping[str, Any], folder: object, dtype: str) -> StoredFormat:
    groups = facts.get("config_groups")
    schemes = [each for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []
    weights = [each.get("weights") for each in schemes]
    known = [each for each in weights if isinstance(each, dict)]
    if not known or len(known) != len(weights) or len({each.get("num_bits") for each in known}) > 1:
        raise _refused(folder, COMPRESSED, "layers in several forms, or in none")
    form = facts.get("format") or schemes[0].get("format")
    form = INTEGER_FORM if form == "naive-quantized" else form  # the same for whole integers
    if form not in (PACKED_FORM, INTEGER_FORM):
        raise _refused(folder, f"compressed-tensors, format {form}", f"the form {form!r}")
    sparsity = facts.get("sparsity_config") or {}
    if sparsity and sparsity.get("format") not in (None, "dense"):
        raise _refused(folder, f"compressed-tensors, sparsity {sparsity.get('format')}", "a sparse form")
    if facts.get("transform_config"):
        raise _refused(folder, "compressed-tensors, transform_config", "weights turned by a transform")
    facts = known[0] | {"bits": known[0].get("num_bits")}
    if facts.get("type", "int") != "int":
        raise _refused(
            folder, f"compressed-tensors, type {facts['type']}", f"numbers of type {facts['type']}"
        )
    if facts.get("strategy") not in (None, "tensor", "channel", "group"):
        raise _refused(folder, f"compressed-tensors, {facts['strategy']}", f"scales by {facts['strategy']}")
    bits, size = _check_bits(facts, folder, COMPRESSED, BITS), _group_size(facts, folder, COMPRESSED)
    label = _grouped_label("compressed-tensors", bits, size)
    return StoredFormat(method=COMPRESSED, label=label, bits=bits, group_size=size, form=form, dtype=dtype)


_FORMATS = {BITSANDBYTES: _bitsandbytes, GPTQ: _gptq, AWQ: _awq, COMPRESSED: _compressed}
