"""Runs whose peak of memory is predicted by `plan` and measured by a trial on the longest rows, through the real program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finetune.models.tiny.checkpoint import build_tiny
from tests.conftest import ROOT

_BYTES_PER_GIBIBYTE = 1 << 30
_PEAK = re.compile(r"([\d.]+) GiB of tensors")
_SIZES = {"vocab_size": 2000, "max_length": 512}


@dataclass(frozen=True)
class MemoryCase:
    """A run.

    Attributes:
        name: What it shows.
        family: Of the model.
        sizes: Of the model.
        words: Settings of the run.
    """

    name: str
    family: str
    sizes: dict[str, int]
    words: tuple[str, ...]
    common: tuple[str, ...] = field(
        default=("--max_length", "256", "--src_length", "128", "--tensor_parallel_degree", "1")
    )


_LARGE = {"hidden_size": 640, "num_layers": 10, "num_heads": 10} | _SIZES
SMALL = MemoryCase(
    "full, packed rows, two micro-batches",
    "llama",
    {"hidden_size": 256, "num_layers": 4, "num_heads": 4} | _SIZES,
    ("--zero_padding", "true", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2",
     "--recompute", "false"),
)  # fmt: skip
CASES = (
    MemoryCase(
        "full, packed rows, two micro-batches", "llama", _LARGE,
        ("--zero_padding", "true", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2",
         "--recompute", "false"),
    ),
    MemoryCase(
        "LoRA, one micro-batch", "qwen2", _LARGE | {"num_key_value_heads": 2},
        ("--lora", "true", "--zero_padding", "true", "--per_device_train_batch_size", "4",
         "--gradient_accumulation_steps", "1", "--recompute", "false"),
    ),
    MemoryCase(
        "full, recomputed, padded rows", "mistral", _LARGE | {"num_key_value_heads": 5},
        ("--per_device_train_batch_size", "24", "--gradient_accumulation_steps", "1", "--recompute", "true"),
    ),
    MemoryCase(
        "full, padded rows", "bloom", _LARGE,
        ("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--recompute", "false"),
    ),
    MemoryCase(
        "full, experts, packed rows", "qwen3_moe",
        {"hidden_size": 384, "num_layers": 8, "num_heads": 6, "num_key_value_heads": 2} | _SIZES,
        ("--zero_padding", "true", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2",
         "--recompute", "false"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class MemoryResult:
    """What was predicted and measured.

    Attributes:
        parameters: Of the model.
        micro_batch: Rows and tokens of each.
        predicted: Bytes of tensors.
        measured: The same, from Paddle's allocator.
    """

    parameters: int
    micro_batch: tuple[int, int]
    predicted: int
    measured: int

    @property
    def difference(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


def run_case(case: MemoryCase, folder: Path, *, num_steps: int = 2) -> MemoryResult:
    """Plans a run and tries it.

    Args:
        case: The run.
        folder: For its model.
        num_steps: Of the trial; the second is the first with optimizer state.
    """
    model = build_tiny(case.family, folder / "model", **case.sizes)
    words = [
        str(ROOT / "llama" / "sft_argument.json"), "--model_name_or_path", str(model),
        "--dataset_name_or_path", str(ROOT / "data"), "--output_dir", str(folder / "out"), "--device", "cpu",
        "--data_cache", "false", "--longest_first", str(num_steps), *case.common, *case.words,
    ]  # fmt: skip
    plan = json.loads(_run(["plan", *words, "--json"]).stdout)
    trial = _run(["train", *words])
    match = _PEAK.search(trial.stdout + trial.stderr)
    assert match, trial.stdout + trial.stderr
    shape = plan["micro_batch"]
    return MemoryResult(
        parameters=plan["parameters"],
        micro_batch=(shape["rows"], shape["length"]),
        predicted=plan["peak_bytes"],
        measured=round(float(match[1]) * _BYTES_PER_GIBIBYTE),
    )


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def results(folder: Path) -> Iterator[tuple[MemoryCase, MemoryResult]]:
    """All large cases, one after the other."""
    for number, case in enumerate(CASES):
        yield case, run_case(case, folder / str(number))
