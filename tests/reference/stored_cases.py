"""Folders that bitsandbytes wrote by way of transformers, and the same from this project's own packing.

The first need bitsandbytes; the second stand for them where it is not installed, their tensors compared by hash.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.quantised_folders import bitsandbytes_layer, write_hugging_face
from tests.reference.curves import HERE
from tests.reference.quantised_cases import digest

GOLDEN_STORED = HERE / "golden_stored.json"
# Name -> element type of the other weights, kind of the packed ones, whether scales are in 8 bits.
STORED: dict[str, tuple[str, str, bool]] = {
    "nf4_double": ("float16", "nf4", True),
    "fp4": ("float32", "fp4", False),
    "int8": ("float16", "llm.int8", False),
}
STATE = ".quant_state.bitsandbytes__"


def facts_of(name: str) -> dict[str, Any]:
    """The `quantization_config` of a case, as transformers takes it."""
    _, kind, double = STORED[name]
    if kind == "llm.int8":
        return {"load_in_8bit": True}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double,
            "bnb_4bit_compute_dtype": "float32"}  # fmt: skip


def write_plain(base: Path, folder: Path, dtype: str) -> Path:
    """The tiny Llama in transformers' form."""
    write_hugging_face(base, folder, dtype)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_stored(base: Path, folder: Path, name: str, offsets: dict[str, float]) -> Path:
    """What bitsandbytes would write.

    Args:
        base: The tiny Llama.
        folder: To make.
        name: Of `STORED`.
        offsets: Layer -> mean of its scales, which torch adds up in an order of its own.
    """
    dtype, kind, double = STORED[name]
    write_plain(base, folder, dtype)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = facts_of(name) | {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for key, array in load_file(folder / "model.safetensors").items():
        layer, _, _ = key.rpartition(".")
        if not layer.endswith("proj"):
            tensors[key] = array
            continue
        weight = np.ascontiguousarray(array.T.astype(np.float32))
        parts, _ = bitsandbytes_layer(weight, kind, double=double, dtype=dtype, offset=offsets.get(layer))
        tensors |= {f"{layer}.{end}": np.ascontiguousarray(part) for end, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def describe(folder: Path) -> dict[str, Any]:
    """Hashes of all tensors of a folder, and what stands in the records of layers."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, array in load_file(path).items():
            if STATE in name:
                found[name] = json.loads(array.tobytes())
            elif not name.endswith("weight_format"):
                found[name] = digest(array)
    return found
