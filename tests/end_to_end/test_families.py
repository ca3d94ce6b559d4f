"""Every shipped argument file with a tiny model: trains, saves, resumes exactly, evaluates in both ways."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.models.family import get_family
from finetune.models.tiny import build_tiny
from tests.conftest import ROOT, losses, read_log, run_entry
from tests.models.families import CASES as FAMILY_CASES

METHODS = ("sft", "lora", "pt", "sft_pp")
SHIPPED = ("llama", "chatglm2", "qwen", "bloom", "opt")
NUM_TRAIN, NUM_DEV = 6, 2
TINY = {"vocab_size": 330, "num_layers": 2, "hidden_size": 32, "max_length": 256}


@dataclass(frozen=True)
class FileCase:
    """An argument file and the tiny model it runs with."""

    folder: str
    method: str
    family: str

    @property
    def arguments(self) -> Path:
        return ROOT / self.folder / f"{self.method}_argument.json"


CASES = [FileCase(name, method, name) for name in SHIPPED for method in METHODS]
CASES += [
    FileCase(folder, method, family)
    for family, folder in (("qwen2", "qwen"), ("mistral", "llama"), ("gemma", "llama"))
    for method in ("sft", "lora")
]
OPTIONS = {case.name: case.options for case in FAMILY_CASES}  # the last row: grouped heads where there are


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Gives the tiny checkpoint of a family, built once."""
    found: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("tiny_families")

    def build(family: str) -> Path:
        if family not in found:
            found[family] = build_tiny(family, root / family, **TINY | OPTIONS[family])
        return found[family]

    return build


@pytest.fixture(scope="session")
def few_samples(tmp_path_factory) -> Path:
    """A data folder with the shortest samples of the sample set, enough for two small steps."""
    folder = tmp_path_factory.mktemp("few_samples")
    for split, count in (("train", NUM_TRAIN), ("dev", NUM_DEV)):
        lines = (ROOT / "data" / f"{split}.json").read_text(encoding="utf-8").splitlines()
        chosen = sorted(lines, key=len)[:count]
        (folder / f"{split}.json").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return folder


def test_every_shipped_file_is_in_the_table():
    files = {path.relative_to(ROOT) for path in ROOT.glob("*/*_argument.json")}
    demonstration = {Path("llama/demo_argument.json")}
    assert files - demonstration == {case.arguments.relative_to(ROOT) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.folder}_{case.method}")
def test_file_trains_saves_resumes_and_evaluates(case, tiny_model, few_samples, tmp_path):
    out = tmp_path / "out"

    def run(**settings: object) -> dict:
        settings = {
            "model_name_or_path": tiny_model(case.family),
            "dataset_name_or_path": few_samples,
            "output_dir": out,
            "device": "cpu",
            "tensor_parallel_degree": 1,
            "pipeline_parallel_degree": 1,
            "max_steps": 2,
            "warmup_steps": 0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "src_length": 64,
            "max_length": 128,
            "evaluation_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "disable_tqdm": True,
        } | settings
        command_line = [part for name, value in settings.items() for part in (f"--{name}", value)]
        assert run_entry(case.arguments, *command_line) == 0
        return json.loads((out / "all_results.json").read_text(encoding="utf-8"))

    by_loss = run()
    curve, checkpoints = losses(out), sorted(path.name for path in out.glob("checkpoint-*"))
    assert len(curve) == 2 and checkpoints == ["checkpoint-1", "checkpoint-2"]
    assert by_loss["eval_loss"] == pytest.approx(curve[-1], rel=0.5)
    final = contents(out)

    # As after a power cut between the two checkpoints: step 2 is done again, from step 1.
    shutil.rmtree(out / "checkpoint-2")
    assert run() == by_loss | {}
    assert losses(out) == curve
    assert contents(out) == final
