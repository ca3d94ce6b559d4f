"""Every shipped argument file with a tiny model: trains, saves, resumes exactly, evaluates in both ways."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from finetune.families import registry
from finetune.families.family import families, get_family
from finetune.models.tiny.checkpoint import build_tiny
from finetune.run.directory import ARGUMENTS_FILE, LOCK_FILE
from finetune.run.reference import REFERENCE_FILE
from tests.conftest import ROOT, launch, losses, read_log, run_entry, write_arguments
from tests.end_to_end.family_models import OPTIONS, TINY
from tests.families.cases import FamilyCase

METHODS = ("sft", "lora", "pt", "sft_pp")
BORROWED_METHODS = ("sft", "lora", "pt")  # one of them for each family that runs with the files of another
NUM_TRAIN, NUM_DEV = 6, 2


@dataclass(frozen=True)
class FileCase:
    """An argument file and the tiny model it runs with."""

    family: str
    method: str
    root: Path = ROOT

    @property
    def arguments(self) -> Path:
        folder = get_family(self.family).argument_folder or self.family
        return self.root / folder / f"{self.method}_argument.json"


def file_cases(root: Path) -> list[FileCase]:
    """Every family with every file in its folder under `root`, or with one of another's, by what the records say."""
    borrowing = sorted(name for name, family in families().items() if family.argument_folder)
    cases = [
        FileCase(name, method, root)
        for name in families()
        for method in ((BORROWED_METHODS[borrowing.index(name) % 3],) if name in borrowing else METHODS)
    ]
    return [case for case in cases if case.arguments.is_file()]


CASES = file_cases(ROOT)
ALIGNMENT_FILES = sorted(
    path
    for path in ROOT.glob("*/*_argument.json")
    if "loss_type" in json.loads(path.read_text(encoding="utf-8"))
)
"""Files of preference methods, which train on other data."""


@pytest.fixture(scope="session")
def few_samples(tmp_path_factory) -> Path:
    """A data folder with the shortest samples of the sample set, enough for two small steps."""
    folder = tmp_path_factory.mktemp("few_samples")
    for split, count in (("train", NUM_TRAIN), ("dev", NUM_DEV)):
        lines = (ROOT / "data" / f"{split}.json").read_text(encoding="utf-8").splitlines()
        chosen = sorted(lines, key=len)[:count]
        (folder / f"{split}.json").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return folder


def test_every_family_and_every_shipped_file_is_in_the_table():
    assert {case.family for case in CASES} == set(families()) == set(OPTIONS)
    files = {path.relative_to(ROOT) for path in ROOT.glob("*/*_argument.json")}
    elsewhere = {Path("llama/demo_argument.json"), *(path.relative_to(ROOT) for path in ALIGNMENT_FILES)}
    assert files - elsewhere == {case.arguments.relative_to(ROOT) for case in CASES}


@pytest.mark.parametrize("readme", sorted(ROOT.glob("*/README.md")), ids=lambda path: path.parent.name)
def test_the_files_that_a_readme_lists_are_there(readme):
    listed = re.findall(r"^\| `(\w+_argument\.json)` \|", readme.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(listed) == {path.name for path in readme.parent.glob("*_argument.json")} - {
        "demo_argument.json"
    }


SETTINGS = {
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
}
"""What a tiny model on a CPU needs; everything else is as the file has it."""
TRAINED = {
    "sft": "model_name_or_path",
    "sft_pp": "model_name_or_path",
    "lora": "lora_path",
    "pt": "prefix_path",
}
"""Setting that takes what a method leaves behind."""
EVALUATE = {"do_train": False}
GENERATE = EVALUATE | {"eval_with_do_generation": True, "max_new_tokens": 4, "save_generation_output": True}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.method}")
def test_file_trains_saves_resumes_and_evaluates(case, tiny_model, few_samples, tmp_path):
    check(case, tiny_model, few_samples, tmp_path)


def check(case, tiny_model, few_samples, tmp_path) -> None:
    """Runs a file four times: to the end, again from its middle, and for the two evaluations."""

    def run(name: str, **settings: object) -> dict:
        base = SETTINGS | {
            "model_name_or_path": tiny_model(case.family),
            "dataset_name_or_path": few_samples,
            "output_dir": tmp_path / name,
        }
        options = [part for key, value in (base | settings).items() for part in (f"--{key}", value)]
        assert run_entry(case.arguments, *options) == 0
        return results(tmp_path / name)

    out = tmp_path / "out"
    trained, curve, weights = run("out"), losses(out), tensors(out / "checkpoint-2")
    assert [record["step"] for record in read_log(out)] == [1, 2]
    assert 0 < trained["eval_loss"] < 2 * curve[0]

    # As after a power cut between two checkpoints: step 2 is done again, from what checkpoint-1 holds.
    cut_power_after_step_1(out)
    assert run("out") == trained
    assert losses(out) == curve
    assert tensors(out / "checkpoint-2") == weights

    saved = {TRAINED[case.method]: out}
    assert run("by_loss", **EVALUATE | saved)["eval_loss"] == trained["eval_loss"]
    assert run("by_generation", **GENERATE | saved)["eval_bleu4"] >= 0
    lines = (tmp_path / "by_generation" / "generated_output.json").read_text(encoding="utf-8").splitlines()
    assert len(lines) == NUM_DEV


def cut_power_after_step_1(out: Path) -> None:
    """Leaves what a run of two steps has on the disk before its second checkpoint is written."""
    kept = (ARGUMENTS_FILE, LOCK_FILE, REFERENCE_FILE, "train_log.jsonl")
    for path in out.iterdir():
        if path.is_dir() and path.name != "checkpoint-1":
            shutil.rmtree(path)
        elif path.is_file() and path.name not in kept:
            path.unlink()


def results(out: Path) -> dict:
    """Metrics of a run, without those of the clock."""
    found = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if "second" not in name}


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """All tensors of a checkpoint: weights and optimizer. (Their order in the files is no contract.)"""
    paths = list(checkpoint.glob("*.safetensors"))
    assert len(paths) == 2
    return {
        f"{path.name}: {name}": array.tobytes() for path in paths for name, array in load_file(path).items()
    }


# What one adds for a sixth family: a record, a folder with argument files, and a row of the table.
QUILL_RECORD = """
from dataclasses import replace

from finetune.families.family import register
from finetune.families.llama.record import LLAMA

NAMES = {"model_type": "quill", "architectures": ["QuillForCausalLM"]}
QUILL = register(
    replace(
        LLAMA,
        name="quill",
        model_types=("quill",),
        architectures=("QuillForCausalLM",),
        lora_target_modules=(".*q_proj.*", ".*down_proj.*"),
        tiny=replace(LLAMA.tiny, config=lambda shape: LLAMA.tiny.config(shape) | NAMES),
    )
)
"""
QUILL_FILE = {
    "model_name_or_path": "nobody/quill-7b",
    "dataset_name_or_path": "./data",
    "output_dir": "./checkpoints/quill",
    "logging_steps": 1,
    "do_train": True,
    "do_eval": True,
}
QUILL_ROW = FamilyCase("quill")


@pytest.fixture
def quill(tmp_path, monkeypatch):
    """Puts the record where records are, as far as Python can tell, and takes it away again."""
    package = importlib.import_module("finetune.families")
    records = tmp_path / "records"
    (records / "quill").mkdir(parents=True)
    (records / "quill" / "__init__.py").write_text('"""Family quill."""\n', encoding="utf-8")
    (records / "quill" / "record.py").write_text(QUILL_RECORD, encoding="utf-8")
    for method, switch in (("sft", {}), ("lora", {"lora": True}), ("pt", {"prefix_tuning": True})):
        write_arguments(tmp_path / "quill" / f"{method}_argument.json", **QUILL_FILE, **switch)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(records)])
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    registry._record_modules.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    registry._record_modules.cache_clear()
    for name in ("finetune.families.quill", "finetune.families.quill.record"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("method", ["sft", "lora", "pt"])
def test_a_sixth_family_is_one_record_one_folder_and_one_row(method, quill, few_samples, tmp_path):
    folder = build_tiny(QUILL_ROW.name, tmp_path / "tiny", **TINY | QUILL_ROW.options)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == "quill"
    assert FileCase(QUILL_ROW.name, method, quill) in file_cases(quill)
    check(FileCase(QUILL_ROW.name, method, root=quill), lambda _family: folder, few_samples, tmp_path)
    if method == "lora":
        names = {name.split(": ")[1] for name in tensors(tmp_path / "out" / "checkpoint-2")}
        assert {name.split(".")[-2] for name in names if name.endswith("lora_A")} == {"q_proj", "down_proj"}


def test_a_model_that_no_record_covers_is_refused_before_weights_are_read(few_samples, tmp_path):
    folder = tmp_path / "model"  # it has no weights at all, and nobody gets as far as noticing
    write_arguments(folder / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    result = launch(
        "-X", "importtime", "finetune_generation.py", ROOT / "llama" / "lora_argument.json", "--device", "cpu",
        "--model_name_or_path", folder, "--dataset_name_or_path", few_samples, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "no family covers model_type 't5'" in line
    assert f"covered families: {', '.join(sorted(families()))}" in line
    assert "| paddle" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ALIGNMENT_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_file_of_a_preference_method_trains_and_evaluates(path, tiny_model, tmp_path):
    """One step on the pairs (or single answers) that are shipped, and an evaluation on a few of those held out."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.json", "dev.json"):
        lines = (ROOT / "data" / "preference" / name).read_text(encoding="utf-8").splitlines()
        (data / name).write_text("\n".join(sorted(lines, key=len)[:6]) + "\n", encoding="utf-8")
    options = (path, "--model_name_or_path", tiny_model(path.parent.name), "--dataset_name_or_path", data)
    settings = (
        "--device",
        "cpu",
        "--max_steps",
        "1",
        "--gradient_accumulation_steps",
        "1",
        "--output_dir",
        tmp_path / "out",
    )
    assert run_entry(*options, *settings, "--max_length", "256", "--src_length", "128") == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text(encoding="utf-8"))
    assert 0.0 <= results["eval_rewards_accuracy"] <= 1.0 and results["train_loss"] > 0
