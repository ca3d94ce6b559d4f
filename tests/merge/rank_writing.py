"""Writes what a run leaves under tensor and pipeline parallelism: one pickle of arrays per rank; and merges it."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from finetune.families.family import Family, families, get_family
from finetune.families.tensor_splits import find_split
from finetune.families.tiny_recipe import TinyShape
from finetune.storage.rank_files import shard_name
from tests.conftest import ROOT

SCRIPT = ROOT / "merge_tp_params.py"
NAMES = sorted(families())
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


def tiny_model(
    name: str, dtype: str = "float32", *, num_layers: int = 4
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and random weights of a tiny model; "bfloat16" gives any 16 bits."""
    recipe = get_family(name).tiny
    hidden = 64
    shape = TinyShape(
        hidden_size=hidden,
        intermediate_size=hidden * (recipe.inner_ratio or 2),
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2 if recipe.grouped_heads else 4,
        vocab_size=96,
        max_length=32,
    )
    generator = np.random.default_rng(5)
    weights = {}
    for key, spec in recipe.weights(shape).items():
        if dtype == "bfloat16":
            weights[key] = generator.integers(0, 2**16, spec.shape).astype(np.uint16)
        else:
            weights[key] = generator.standard_normal(spec.shape).astype(dtype)
    return recipe.config(shape), weights


def write_ranks(
    folder: Path,
    model: tuple[dict[str, Any], dict[str, np.ndarray]],
    family: Family,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    stem: str = "model_state",
) -> Path:
    """Splits a model and writes a file per rank, and config.json as PaddleNLP leaves it."""
    config, weights = model
    folder.mkdir(parents=True, exist_ok=True)
    written = config | {"tensor_parallel_degree": tensor, "tensor_parallel_rank": 0}
    if pipeline > 1:
        written["architectures"] = [f"{name}Pipe" for name in config.get("architectures", ["Model"])]
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    stages = stages_of(weights, config[family.fields.num_layers], pipeline)
    for rank in range(tensor):
        for stage in range(pipeline):
            parts = {
                key: (key, part_of(family, config, key, value, degree=tensor, rank=rank))
                for key, value in weights.items()
                if stages[key] == stage
            }
            ranks = {"tensor": rank if tensor > 1 else None, "pipeline": stage if pipeline > 1 else None}
            with (folder / shard_name(stem, **ranks)).open("wb") as file:
                pickle.dump(parts, file, protocol=4)
    return folder


def part_of(
    family: Family, config: Any, name: str, whole: np.ndarray, *, degree: int, rank: int
) -> np.ndarray:
    """What a rank holds of a tensor."""
    split = find_split(family, name, family.adapt_config(config), degree=degree)
    return np.ascontiguousarray(split.part(whole, degree, rank)) if split else whole


def stages_of(weights: dict[str, np.ndarray], num_layers: int, pipeline: int) -> dict[str, int]:
    """Stage of every tensor: layers evenly, what comes before and after them at the ends."""
    stages, seen_layer = {}, False
    for key in weights:
        match = _LAYER.search(key)
        seen_layer = seen_layer or bool(match)
        last = pipeline - 1
        stages[key] = int(match[1]) * pipeline // num_layers if match else last * seen_layer
    return stages


def read_whole(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a merged folder."""
    from finetune.storage.safetensors_files import read_safetensors

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        for name, array in read_safetensors(path).arrays.items():
            data = content[array.start : array.start + array.num_bytes]
            tensors[name] = np.frombuffer(data, array.dtype).reshape(array.shape)
    return tensors


def check_same(merged: dict[str, np.ndarray], whole: dict[str, np.ndarray]) -> None:
    """Every tensor, bit for bit."""
    assert merged.keys() == whole.keys()
    for name, expected in whole.items():
        assert merged[name].dtype == expected.dtype, name
        assert merged[name].shape == expected.shape, name
        assert merged[name].tobytes() == expected.tobytes(), name


def run_command(*words, **options) -> subprocess.CompletedProcess[str]:
    """Runs the merge of files of ranks as a user does."""
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, **options)
