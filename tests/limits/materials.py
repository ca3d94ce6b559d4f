"""What the commands of the cases work on, made once: two models, their adapters, files of two ranks, data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.models.tiny.checkpoint import build_tiny
from tests.conftest import ROOT

BASE: Mapping[str, Any] = {
    "do_train": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4,
    "src_length": 64, "max_length": 128, "device": "cpu",
}  # fmt: skip


class Materials:
    """Folders by name; `{name}` in a command stands for one.

    Args:
        folder: Where they are made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.places = {
            name: folder / name for name in ("model", "large", "data", "adapter", "large_adapter", "ranks")
        }
        build_tiny("llama", self.places["model"])
        build_tiny(
            "llama", self.places["large"], hidden_size=1024, num_layers=4, num_heads=8, vocab_size=4000
        )
        self._write_data(self.places["data"])
        self._train("adapter", "model", {"lora": True})
        self._train("large_adapter", "large", {"lora": True, "max_steps": 1, "save_strategy": "no"})
        self._train(
            "ranks", "model", {"tensor_parallel_degree": 2, "unified_checkpoint": False}, num_processes=2
        )
        self.places["ranks"] /= "checkpoint-4"

    def _write_data(self, folder: Path) -> None:
        folder.mkdir()
        for name, number in (("train", 64), ("dev", 8)):
            with (ROOT / "data" / f"{name}.json").open(encoding="utf-8") as lines:
                text = "".join(line for _, line in zip(range(number), lines, strict=False))
            (folder / f"{name}.json").write_text(text, encoding="utf-8")

    def _train(self, name: str, model: str, settings: Mapping[str, Any], *, num_processes: int = 1) -> None:
        path = self.folder / f"{name}.json"
        places = {
            "model_name_or_path": str(self.places[model]),
            "dataset_name_or_path": str(self.places["data"]),
        }
        path.write_text(json.dumps({**BASE, **places, **settings, "output_dir": str(self.places[name])}))
        words = launching(
            num_processes, self.folder / "log", [str(ROOT / "finetune_generation.py"), str(path)]
        )
        subprocess.run(words, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=200)


def launching(num_processes: int, log: Path, words: Sequence[str]) -> list[str]:
    """The command of a script, under Paddle's launcher where there are several processes."""
    options = ["--nproc_per_node", str(num_processes), "--log_dir", str(log)]
    launcher = ["-m", "paddle.distributed.launch", *options] if num_processes > 1 else []
    return [sys.executable, *launcher, *words]


def environment(**more: str) -> dict[str, str]:
    """Of a process that is no rank yet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PADDLE_", "FLAGS_"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | more
