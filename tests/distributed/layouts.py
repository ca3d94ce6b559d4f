"""Runs of one training in many layouts, and how far their curves are apart.

A case is a family, a method, a layout and a variation of the settings. Its curve (loss, norm of the gradient and learning
rate of every step; the metrics of every evaluation) is compared with that of one process with the same global batches.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.distributed.server_runs import ROOT, Curve, RankServer, Run
from tests.families.cases import FACTS

NUM_STEPS = 20
GLOBAL_BATCH_SIZE = 8
TOLERANCE = 1e-5

FAMILIES = tuple(FACTS)
_SECOND = ("chatglm2", "bloom", "qwen2", "ernie4_5", "mistral", "glm4")
"""Families that begin with the second variation; of those that came later it is left to their names."""
_FIRST = ("llama", "qwen", "opt", "qwen3", "phi3", "gemma")

METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "lora": {"lora": True, "lora_rank": 4},
    "pt": {"prefix_tuning": True, "num_prefix_tokens": 6},
}


@dataclass(frozen=True)
class LayoutCase:
    """A layout to be tried.

    Attributes:
        world: Number of processes.
        micro_batch_size: Rows of a forward pass.
        settings: Degrees.
        num_replicas: Ranks that take different samples.
    """

    world: int
    micro_batch_size: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_replicas: int = 1

    def arguments(self) -> dict[str, Any]:
        """The settings of the layout; the global batch is that of all others."""
        accumulation, rest = divmod(GLOBAL_BATCH_SIZE, self.micro_batch_size * self.num_replicas)
        assert not rest
        sizes = {
            "per_device_train_batch_size": self.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
        }
        return {**sizes, **self.settings}


def _degrees(tensor: int = 1, pipeline: int = 1, sharding: int = 1, stage: int = 0) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if tensor > 1:
        settings["tensor_parallel_degree"] = tensor
    if pipeline > 1:
        settings["pipeline_parallel_degree"] = pipeline
    if sharding > 1:
        settings |= {"sharding": f"stage{stage}", "sharding_parallel_degree": sharding}
    return settings


ONE = LayoutCase(1, 4)
LAYOUTS: dict[str, LayoutCase] = {
    "dp2": LayoutCase(2, 2, {}, 2),
    "tp2": LayoutCase(2, 4, _degrees(tensor=2)),
    "pp2": LayoutCase(2, 2, _degrees(pipeline=2)),
    "sharding2 stage1": LayoutCase(2, 2, _degrees(sharding=2, stage=1), 2),
    "sharding2 stage2": LayoutCase(2, 1, _degrees(sharding=2, stage=2), 2),
    "sharding2 stage3": LayoutCase(2, 2, _degrees(sharding=2, stage=3), 2),
    "pp2 virtual2": LayoutCase(2, 2, _degrees(pipeline=2) | {"virtual_pp_degree": 2}),
    "tp2 sequence": LayoutCase(2, 4, _degrees(tensor=2) | {"sequence_parallel": True}),
    "dp4": LayoutCase(4, 1, {}, 4),
    "tp4": LayoutCase(4, 8, _degrees(tensor=4)),
    "dp2 x tp2": LayoutCase(4, 2, _degrees(tensor=2), 2),
    "tp2 x pp2": LayoutCase(4, 2, _degrees(tensor=2, pipeline=2)),
    "tp2 x sharding2": LayoutCase(4, 2, _degrees(tensor=2, sharding=2, stage=2), 2),
    "pp2 x sharding2": LayoutCase(4, 1, _degrees(pipeline=2, sharding=2, stage=1), 2),
}

VARIATIONS: dict[str, dict[str, Any]] = {
    "padded": {"neftune": True, "max_grad_norm": 0.5, "weight_decay": 0.1},
    "packed": {"zero_padding": True, "recompute": True, "max_grad_norm": 0.3},
    "lazy": {"lazy": True, "warmup_steps": 0, "weight_decay": 0.05},
    "lazy packed": {"lazy": True, "zero_padding": True, "neftune": True, "max_grad_norm": 1.0},
}
DROPOUT = {"lora": {"lora_dropout": 0.1}}
"""What else draws at random, for the packed variation."""

COMMON: dict[str, Any] = {
    "device": "cpu",
    "do_train": True,
    "do_eval": True,
    "max_steps": NUM_STEPS,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "logging_steps": 1,
    "evaluation_strategy": "steps",
    "eval_steps": 10,
    "save_strategy": "no",
    "per_device_eval_batch_size": 3,
    "src_length": 40,
    "max_length": 64,
    "disable_tqdm": True,
    "data_cache": False,
}
NUM_TRAIN, NUM_DEV = 43, 11
"""43 samples leave 3 for the last batch of an epoch: fewer than four ranks."""


LAZY_LAYOUTS = ("tp2", "dp4", "pp2 x sharding2")


def variation_of(family: str, method: str, layout: str) -> str:
    """Spreads the variations over families, methods and layouts.

    The lazy ones, which start a process more per rank, come with three layouts; which of the two is left to family
    and method, so that a row of the matrix needs two curves of one process.
    """
    begins_second = family in _SECOND or (family not in _FIRST and sum(family.encode()) % 2)
    is_second = (begins_second + list(METHODS).index(method)) % 2
    pair = ("lazy", "lazy packed") if layout in LAZY_LAYOUTS else ("packed", "padded")
    return pair[is_second]


# ------------------------------------------------------------------------------------------------ models and data


def build_model(
    family: str,
    folder: Path,
    *,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    hidden_size: int = 32,
    max_length: int = 128,
) -> Path:
    """A tiny model in which nothing is too small to be seen: larger weights, biases and norms that are not trivial."""
    from safetensors.numpy import load_file, save_file

    from finetune.models.tiny.checkpoint import build_tiny

    options = {
        **FACTS[family].small,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
    }
    options["vocab_size"] = 640
    options |= {"num_key_value_heads": num_kv_heads} if num_kv_heads else {}
    build_tiny(family, folder, max_length=max_length, **options)
    _edit_config(folder / "config.json", **FACTS[family].smooth_config)
    path = folder / "model.safetensors"
    draw = np.random.default_rng(7)
    tensors = {
        name: _larger(tensor, draw.standard_normal(tensor.shape).astype(np.float32))
        for name, tensor in sorted(load_file(path).items())
    }
    save_file(tensors, path, metadata={"format": "np"})
    return folder


def _edit_config(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def _larger(tensor: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return tensor * np.float32(6.0) if tensor.ndim > 1 else tensor + np.float32(0.1) * noise


def build_data(
    folder: Path, num_train: int = NUM_TRAIN, num_dev: int = NUM_DEV, *, many_lengths: bool = False
) -> Path:
    """A data folder with the first lines of the sample set.

    Args:
        folder: To create.
        num_train: Lines of train.json.
        num_dev: Lines of dev.json.
        many_lengths: Whether texts are cut to other lengths, so that the micro-batches of a step have rows of several;
            as they are, nearly all reach the longest that is allowed.
    """
    folder.mkdir(parents=True)
    for split, count in (("train", num_train), ("dev", num_dev)):
        lines = (ROOT / "data" / f"{split}.json").read_text(encoding="utf-8").splitlines()[:count]
        if many_lengths:
            lines = [_cut(json.loads(line), number) for number, line in enumerate(lines)]
        (folder / f"{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _cut(record: dict[str, str], number: int) -> str:
    source, answer = record["src"][: 3 + 5 * number % 11], record["tgt"][: 2 + 7 * number % 17]
    return json.dumps({"src": source, "tgt": answer}, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------ running


def curve_from(curve: Curve, first_step: int) -> Curve:
    """The part of a curve from a step on."""
    return {
        name: {step: value for step, value in values.items() if step >= first_step}
        for name, values in curve.items()
    }


def largest_difference(curve: Curve, expected: Curve) -> dict[str, float]:
    """The largest relative difference of each kind of figure.

    Raises:
        AssertionError: One has figures that the other lacks.
    """
    assert {name: list(values) for name, values in curve.items()} == {
        name: list(values) for name, values in expected.items()
    }
    assert {"loss", "grad_norm", "learning_rate"} <= curve.keys()
    return {
        name: max(_relative(curve[name][step], value) for step, value in values.items())
        for name, values in expected.items()
    }


def _relative(value: float, expected: float) -> float:
    # Not a number and infinity are as far away as can be, also from themselves.
    if not (math.isfinite(value) and math.isfinite(expected)):
        return math.inf
    return abs(value - expected) / max(abs(expected), 1e-12)


class Bench:
    """Models, data and one-process curves, each made when it is first asked for.

    Args:
        folder: Where everything is written.
        server: Runs the cases.
    """

    def __init__(self, folder: Path, server: RankServer):
        self.folder, self.server = folder, server
        self._curves: dict[tuple[str, str, str], Curve] = {}

    def model(self, family: str) -> Path:
        """A family's model folder."""
        path = self.folder / "models" / family
        return path if path.exists() else build_model(family, path)

    def data(self) -> Path:
        """The data folder."""
        path = self.folder / "data"
        return path if path.exists() else build_data(path, many_lengths=True)

    def settings(self, family: str, method: str, variation: str) -> dict[str, Any]:
        """The arguments of a case, but for the layout."""
        places = {"model_name_or_path": str(self.model(family)), "dataset_name_or_path": str(self.data())}
        dropout = DROPOUT.get(method, {}) if variation == "packed" else {}
        return {**COMMON, **METHODS[method], **VARIATIONS[variation], **dropout, **places}

    def expected(self, family: str, method: str, variation: str) -> Curve:
        """The curve of one process."""
        key = (family, method, variation)
        if key not in self._curves:
            settings = self.settings(*key) | ONE.arguments()
            self._curves[key] = self.server.run(settings).check().curve()
        return self._curves[key]

    def run(self, family: str, method: str, layout: str, variation: str | None = None) -> Run:
        """Runs a case in its layout."""
        variation = variation or variation_of(family, method, layout)
        case = LAYOUTS[layout]
        return self.server.run(self.settings(family, method, variation) | case.arguments(), case.world)

    def differences(
        self, family: str, method: str, layout: str, variation: str | None = None
    ) -> dict[str, float]:
        """Runs a case and compares it with one process."""
        variation = variation or variation_of(family, method, layout)
        curve = self.run(family, method, layout, variation).check().curve()
        return largest_difference(curve, self.expected(family, method, variation))


@contextlib.contextmanager
def open_bench(folder: Path) -> Iterator[Bench]:
    """A bench and its server, for the time of the block."""
    server = RankServer(folder)
    try:
        yield Bench(folder, server)
    finally:
        server.close()
