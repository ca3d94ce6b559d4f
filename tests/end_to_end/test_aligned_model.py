"""What follows an alignment: the adapter answers, is merged and exported, and all forms of it are one model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, read_log, run_entry, write_arguments

PAIRS = ROOT / "tests" / "reference" / "data" / "pairs"
SETTINGS = {
    "device": "cpu", "do_train": True, "do_eval": True, "max_steps": 8, "evaluation_strategy": "no", "logging_steps": 1,
    "per_device_train_batch_size": 4, "learning_rate": 2e-2, "src_length": 96, "max_length": 200, "data_cache": False,
    "disable_tqdm": True, "dataset_name_or_path": str(PAIRS), "validation_split": 6, "save_strategy": "no",
    "chat_template": "vicuna",
}  # fmt: skip
METHODS = {
    "DPO with LoRA": {"loss_type": "sigmoid", "lora": True, "lora_rank": 8, "zero_padding": True},
    "KTO with LoRA": {"loss_type": "kto", "lora": True, "lora_rank": 8, "lora_target_modules": ["all"]},
    "SimPO": {"loss_type": "simpo", "beta": 2.0, "learning_rate": 2e-3},
}


def command(script: str, *words: object) -> None:
    """Runs a script of the repository inside this process; it must end well."""
    from finetune.processes.command import run_command

    argv, sys.argv = sys.argv, [f"{script}.py", *map(str, words)]
    try:
        assert run_command(importlib.import_module(script).main) == 0
    finally:
        sys.argv = argv


def answers(folder: Path, name: str, *model: object) -> list[str]:
    output = folder / f"{name}.jsonl"
    words = ["--data_file", PAIRS / "train.json", "--max_new_tokens", 10, "--device", "cpu"]
    command("predict_generation", *words, "--output_file", output, *model)
    return [json.loads(line)["output"] for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "method",
    [pytest.param(each, marks=[pytest.mark.slow] if each != "DPO with LoRA" else []) for each in METHODS],
)
def test_all_forms_of_an_aligned_model_answer_alike(sharp_llama, tmp_path, method):
    out, merged, graph = (tmp_path / name for name in ("out", "merged", "graph"))
    settings = SETTINGS | METHODS[method]
    places = {"model_name_or_path": str(sharp_llama), "output_dir": str(out)}
    assert run_entry(write_arguments(tmp_path / "a.json", **settings | places)) == 0
    has_adapter = "lora" in settings

    model = (
        ["--model_name_or_path", sharp_llama, "--lora_path", out]
        if has_adapter
        else ["--model_name_or_path", out]
    )
    found = {"trained": answers(tmp_path, "trained", *model)}
    command("export_model", *model, "--output_path", graph, "--device", "cpu")
    found["static"] = answers(tmp_path, "static", "--model_name_or_path", graph)
    if has_adapter:
        command("merge_lora_params", *model, "--merge_model_path", merged, "--device", "cpu")
        found["merged"] = answers(tmp_path, "merged", "--model_name_or_path", merged)
    before = answers(tmp_path, "before", "--model_name_or_path", sharp_llama, "--chat_template", "vicuna")
    assert all(each == found["trained"] for each in found.values())
    assert found["trained"] != before
    if has_adapter:
        assert_same_rewards(tmp_path, settings, merged, sharp_llama, read_log(out, "eval")[-1])


def assert_same_rewards(folder, settings, merged, base, expected) -> None:
    """The merged model, compared with the base as its reference, has the rewards that the adapter ended with."""
    evaluation = {"do_train": False, "lora": False, "reference_model": str(base)}
    places = {"model_name_or_path": str(merged), "output_dir": str(folder / "evaluated")}
    assert run_entry(write_arguments(folder / "b.json", **settings | evaluation | places)) == 0
    found = json.loads((folder / "evaluated" / "all_results.json").read_text())
    assert abs(expected["eval_rewards_margin"]) > 0.05
    for name in ("loss", "rewards_margin", "rewards_chosen", "rewards_accuracy", "logps_rejected"):
        assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=2e-4), name
