"""Folders whose config.json says nothing of their packed weights, because a file beside it does.

    quantize_config.json    AutoGPTQ: bits, group_size, desc_act, sym; model_file_base_name tells the weights' name
    quant_config.json       AutoAWQ: w_bit, q_group_size, zero_point, version

Both libraries wrote them before transformers had a place in config.json; newer ones write both. Other tools use the same
names for other things, so that a file counts only where it tells bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.storage.files import is_present, read_json_if_present

SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Name -> the method of folders that have it."""
TOLD_BY = "told_by"
"""Field of the facts: the name of the file that they come from."""
_BITS = ("bits", "w_bit")
_COMPARED = (_BITS, ("group_size", "q_group_size"), ("checkpoint_format",))


def read_side_facts(folder: Path) -> dict[str, Any]:
    """What a folder's side file says, as a `quantization_config` would; empty without one.

    Raises:
        UserError: The file is no JSON object.
    """
    for name, method in SIDE_FILES.items():
        path = folder / name
        if is_present(path):
            facts = read_json_if_present(path)
            if _value(facts, _BITS) is not None:
                return {"quant_method": method} | facts | {TOLD_BY: name}
    return {}


def with_side_facts(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A configuration with what stands in the side file, where it says nothing itself.

    Args:
        config: config.json of the folder.
        folder: Where it is.

    Raises:
        UserError: Both say something, and not the same.
    """
    theirs = read_side_facts(folder)
    own = config.get("quantization_config")
    if not theirs or config.get("compression_config"):
        return dict(config)
    own = own if isinstance(own, dict) else {}
    if not any(own.get(name) for name in ("quant_method", "weight_quantize_algo", "quant_type", *_BITS)):
        return dict(config) | {"quantization_config": theirs}
    for names in _COMPARED:
        ours, other = _value(own, names), _value(theirs, names)
        if None not in (ours, other) and ours != other:
            raise UserError(
                f"{folder}: {names[0]} is {ours!r} in quantization_config of config.json and {other!r} in "
                f"{theirs[TOLD_BY]}: one of them is of another model, remove what is wrong or copy the folder again"
            )
    return dict(config)


def find_old_start(names: Iterable[str], facts: Mapping[str, Any]) -> str | None:
    """The file that the weights of a folder start with whose names are not the usual ones.

    Args:
        names: Of the folder's files.
        facts: Of `read_side_facts`.
    """
    if not facts:
        return None
    files = set(names)
    usual = f"gptq_model-{_value(facts, _BITS)}bit-{_value(facts, _COMPARED[1])}g"
    stems = [stem for stem in (facts.get("model_file_base_name"), usual) if isinstance(stem, str) and stem]
    for stem in stems:
        for ending in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin"):
            if f"{stem}{ending}" in files:
                return f"{stem}{ending}"
    lone = [
        name
        for name in files
        if name.endswith(".safetensors") and "/" not in name and not name.startswith("adapter_")
    ]
    return lone[0] if len(lone) == 1 else None


def _value(facts: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((facts[name] for name in names if facts.get(name) is not None), None)
