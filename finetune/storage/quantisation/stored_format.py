"""How the weights of a folder are quantised, by the `quantization_config` of its config.json or a file beside it.

    bitsandbytes          nf4, fp4 and 8 bits as transformers saves them
    gptq                  GPTQ of AutoGPTQ and GPTQModel, first and second form
    awq                   AWQ of AutoAWQ, form "gemm"
    compressed-tensors    whole integers in the forms "pack-quantized" and "int-quantized"
    paddlenlp             8 bits by PaddleNLP's `llm.int8` and `weight_only_int8`

Everything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune.errors import UserError
from finetune.storage.quantisation.grouped_matrix import BITS
from finetune.storage.quantisation.side_files import TOLD_BY

BITSANDBYTES, GPTQ, AWQ, COMPRESSED = "bitsandbytes", "gptq", "awq", "compressed-tensors"
PADDLENLP = "paddlenlp"
PADDLENLP_INT8 = ("llm.int8", "weight_only_int8")
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
        is_symmetric: Whether the zero point of every group is said to be the middle of its integers; None: not said.
        is_ordered: Whether columns are in groups by an order that the files must hold.
        exceptions: Pattern of layers' names -> the settings that these have otherwise, the first that fits counts.
        told_by: The file that says all this.
    """

    method: str
    label: str
    bits: int
    group_size: int = -1
    form: str = ""
    dtype: str = "float16"
    is_symmetric: bool | None = None
    is_ordered: bool = False
    exceptions: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    told_by: str = "config.json"

    def for_layer(self, name: str) -> StoredFormat:
        """The format of one layer.

        Args:
            name: Of the layer, without ".weight".
        """
        for pattern, changes in self.exceptions:
            if re.match(pattern, name):
                return replace(self, **changes)
        return self


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
    told_by = facts.get(TOLD_BY) or "quantization_config of its config.json"
    origin = f"{folder} is quantised ({told_by}"
    own = facts.get("weight_quantize_algo") or facts.get("quant_type")
    if not method and not own:  # PaddleNLP writes the object into every config.json
        if bits := facts.get("bits"):
            raise _refused(origin, "method unnamed", f"{bits} bits in a way that it does not name")
        return None
    dtype = config.get("torch_dtype") or config.get("dtype")
    dtype = dtype if dtype in _HALF_TYPES else "float16"
    if not method:
        if not isinstance(own, str):
            raise _refused(origin, "several algorithms", "PaddleNLP's algorithms by layer")
        return _paddlenlp(origin, own, dtype)
    if not isinstance(method, str) or method not in _FORMATS:
        bits = facts.get("bits") or facts.get("num_bits") or facts.get("nbits")
        raise _refused(origin, str(method), f"the method {method}{f', {bits} bits' if bits else ''}")
    form = _FORMATS[method](facts, origin, dtype)
    return replace(form, told_by=str(facts.get(TOLD_BY) or form.told_by))


def without_format(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model with ordinary weights."""
    return {name: value for name, value in config.items() if name not in CONFIG_FIELDS}


def _refused(origin: str, what: str, detail: str) -> UserError:
    return UserError(f"model {origin}: {what}): {detail}, which cannot be read here; {_REMEDY}")


def _paddlenlp(origin: str, algorithm: str, dtype: str) -> StoredFormat:
    if algorithm in PADDLENLP_INT8:
        return StoredFormat(
            method=PADDLENLP, label=f"PaddleNLP's {algorithm}", bits=8, form=algorithm, dtype=dtype
        )
    why = {
        "weight_only_int4": "its bytes lie in an order of the GPU that wrote them, which nothing in the file tells",
        "nf4": "its blocks go through a weight across the rows that blocks are held in here",
        "fp4": "its blocks go through a weight across the rows that blocks are held in here",
    }.get(algorithm, "a form of PaddleNLP's with quantised activations")
    raise _refused(origin, algorithm, f"PaddleNLP's {algorithm}: {why}")


def _bitsandbytes(facts: Mapping[str, Any], origin: str, dtype: str) -> StoredFormat:
    if facts.get("load_in_4bit"):
        kind = facts.get("bnb_4bit_quant_type", "fp4")
        double = ", scales in 8 bits" if facts.get("bnb_4bit_use_double_quant") else ""
        return StoredFormat(
            method=BITSANDBYTES, label=f"bitsandbytes' {kind}{double}", bits=4, form=str(kind), dtype=dtype
        )
    if facts.get("load_in_8bit"):
        return StoredFormat(method=BITSANDBYTES, label="bitsandbytes' 8 bits", bits=8, dtype=dtype)
    raise _refused(origin, BITSANDBYTES, "bitsandbytes with neither load_in_4bit nor load_in_8bit")


def _check_bits(facts: Mapping[str, Any], origin: str, method: str, allowed: tuple[int, ...]) -> int:
    bits = facts.get("bits", facts.get("w_bit"))
    if isinstance(bits, bool) or bits not in allowed:
        listed = " or ".join(map(str, allowed))
        raise _refused(
            origin, f"{method}, {bits} bits", f"{method} in {bits!r} bits, where {listed} are known"
        )
    return int(bits)


def _group_size(facts: Mapping[str, Any], origin: str, method: str) -> int:
    size = facts.get("group_size", facts.get("q_group_size", -1))
    size = -1 if size is None else size
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise _refused(origin, f"{method}, group_size {size!r}", f"{method} in groups of {size!r}")
    return size


def _grouped_label(name: str, bits: int, size: int) -> str:
    return f"{name}, {bits} bits, {'whole rows' if size == -1 else f'groups of {size}'}"


def _gptq(facts: Mapping[str, Any], origin: str, dtype: str) -> StoredFormat:
    bits, size = _check_bits(facts, origin, GPTQ, BITS), _group_size(facts, origin, GPTQ)
    form = facts.get("checkpoint_format") or ("marlin" if facts.get("is_marlin_format") else "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise _refused(origin, f"gptq, checkpoint_format {form}", f"GPTQ in the form {form!r}")
    label = _grouped_label("GPTQ" if form == "gptq" else "GPTQ v2", bits, size)
    return StoredFormat(
        method=GPTQ,
        label=label,
        bits=bits,
        group_size=size,
        form=form,
        dtype=dtype,
        is_symmetric=_flag(facts, "sym"),
        is_ordered=bool(facts.get("desc_act")),
        exceptions=_gptq_exceptions(facts, origin),
    )


def _gptq_exceptions(facts: Mapping[str, Any], origin: str) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """GPTQModel's `dynamic`: pattern of names, with "+:" or nothing before it -> other settings.

    Layers whose pattern has "-:" before it stay as they are, which their tensors tell.
    """
    dynamic = facts.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise _refused(origin, "gptq, dynamic", f"dynamic is no object but {dynamic!r}")
    found = []
    for key, settings in dynamic.items():
        pattern = key.removeprefix("+:").removeprefix("-:")
        try:
            re.compile(pattern)
        except re.error as error:
            raise _refused(origin, "gptq, dynamic", f"the pattern {key!r} of dynamic ({error})") from None
        changes: dict[str, Any] = {}
        own = dict(facts) | (settings if isinstance(settings, dict) else {})
        if not key.startswith("-:"):
            changes = {
                "bits": _check_bits(own, origin, GPTQ, BITS),
                "group_size": _group_size(own, origin, GPTQ),
                "is_symmetric": _flag(own, "sym"),
                "is_ordered": bool(own.get("desc_act")),
            }
        found.append((pattern, changes))
    return tuple(found)


def _flag(facts: Mapping[str, Any], name: str) -> bool | None:
    return bool(facts[name]) if facts.get(name) is not None else None


def _awq(facts: Mapping[str, Any], origin: str, dtype: str) -> StoredFormat:
    form = str(facts.get("version", facts.get("checkpoint_format", "gemm"))).lower()
    if form != "gemm":
        raise _refused(origin, f"awq, version {form}", f"AWQ in the form {form!r}")
    bits, size = _check_bits(facts, origin, AWQ, (4,)), _group_size(facts, origin, AWQ)
    has_zeros = _flag(facts, "zero_point")
    return StoredFormat(
        method=AWQ,
        label=_grouped_label("AWQ", bits, size),
        bits=bits,
        group_size=size,
        form=form,
        dtype=dtype,
        is_symmetric=None if has_zeros is None else not has_zeros,
    )


def _compressed(facts: Mapping[str, Any], origin: str, dtype: str) -> StoredFormat:
    groups = facts.get("config_groups")
    schemes = [each for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []
    weights = [each.get("weights") for each in schemes]
    known = [each for each in weights if isinstance(each, dict)]
    if not known or len(known) != len(weights) or len({_compressed_kind(each) for each in known}) > 1:
        kinds = ", ".join(str(each.get("num_bits")) for each in known)
        what = f"layers in several forms, of {kinds} bits" if known else "layers in several forms, or in none"
        raise _refused(origin, COMPRESSED, what)
    form = facts.get("format") or schemes[0].get("format")
    form = INTEGER_FORM if form == "naive-quantized" else form  # the same for whole integers
    if form not in (PACKED_FORM, INTEGER_FORM):
        raise _refused(origin, f"compressed-tensors, format {form}", f"the form {form!r}")
    sparsity = facts.get("sparsity_config") or {}
    if sparsity and sparsity.get("format") not in (None, "dense"):
        raise _refused(origin, f"compressed-tensors, sparsity {sparsity.get('format')}", "a sparse form")
    if facts.get("transform_config"):
        raise _refused(origin, "compressed-tensors, transform_config", "weights turned by a transform")
    facts = known[0] | {"bits": known[0].get("num_bits")}
    if facts.get("type", "int") != "int":
        raise _refused(
            origin, f"compressed-tensors, type {facts['type']}", f"numbers of type {facts['type']}"
        )
    if facts.get("strategy") not in (None, "tensor", "channel", "group"):
        raise _refused(origin, f"compressed-tensors, {facts['strategy']}", f"scales by {facts['strategy']}")
    bits, size = _check_bits(facts, origin, COMPRESSED, BITS), _group_size(facts, origin, COMPRESSED)
    label = _grouped_label("compressed-tensors", bits, size)
    return StoredFormat(
        method=COMPRESSED,
        label=label,
        bits=bits,
        group_size=size,
        form=form,
        dtype=dtype,
        is_symmetric=_flag(facts, "symmetric"),
        is_ordered=facts.get("actorder") is True or facts.get("actorder") in ("group", "dynamic"),
    )


def _compressed_kind(weights: Mapping[str, Any]) -> tuple[str, ...]:
    """What layers of one form have in common."""
    names = ("num_bits", "type", "strategy", "group_size", "symmetric", "actorder")
    return tuple(repr(weights.get(name)) for name in names)


_FORMATS = {BITSANDBYTES: _bitsandbytes, GPTQ: _gptq, AWQ: _awq, COMPRESSED: _compressed}
