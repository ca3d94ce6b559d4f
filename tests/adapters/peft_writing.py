"""Adapters in peft's form, written with NumPy, and the base that each makes when it is merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.storage.torch_writing import save_bin

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 6,
    "bias": "none",
}


def write_peft(
    folder: Path,
    base: Path,
    layers: Mapping[str, tuple[int, float]],
    *,
    whole: Sequence[str] = (),
    num_rows: int | None = None,
    pickled: bool = False,
    **config: Any,
) -> Path:
    """Writes an adapter with random matrices for a base in Hugging Face's form; returns the merged base.

    Args:
        folder: Of the adapter.
        base: Folder of a model under Hugging Face's names.
        layers: Hugging Face's name of a layer -> rank and factor of its update.
        whole: Names of tensors that are replaced.
        num_rows: Rows of the replaced tensors, where there are more than the base has.
        pickled: Whether to write PyTorch's form.
        config: Fields of `adapter_config.json`.
    """
    generator = np.random.default_rng(11)
    weights = load_file(base / "model.safetensors")
    tensors = {}
    for layer, (rank, factor) in layers.items():
        outputs, inputs = weights[f"{layer}.weight"].shape
        left = 0.2 * generator.standard_normal((rank, inputs)).astype(np.float32)
        right = 0.2 * generator.standard_normal((outputs, rank)).astype(np.float32)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = left
        tensors[f"base_model.model.{layer}.lora_B.weight"] = right
        weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + np.float32(factor) * (right @ left)
    for name in whole:
        rows = weights[name]
        if num_rows:
            rows = np.concatenate([rows, np.zeros((num_rows - len(rows), *rows.shape[1:]), np.float32)])
        weights[name] = (rows + 0.1 * generator.standard_normal(rows.shape)).astype(np.float32)
        tensors[f"base_model.model.{name}"] = weights[name]
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    if pickled:
        save_bin(folder / "adapter_model.bin", tensors)
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    merged = folder.with_name(f"{folder.name}-merged")
    merged.mkdir()
    content = json.loads((base / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(content | ({"vocab_size": num_rows} if num_rows else {})))
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return merged
