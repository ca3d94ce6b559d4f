"""Preference alignment through the entry script: what it leaves, continuing, evaluating, merging, faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from finetune.models.tiny.checkpoint import build_tiny
from finetune.run.reference import REFERENCE_FILE
from finetune.settings.arguments import parse_arguments
from tests.conftest import ROOT, losses, read_log, run_entry, write_arguments

PAIRS = ROOT / "tests" / "reference" / "data" / "pairs"
COMMON = {
    "device": "cpu", "do_train": True, "do_eval": True, "max_steps": 6, "save_steps": 3, "save_strategy": "steps",
    "evaluation_strategy": "steps", "eval_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4,
    "learning_rate": 1e-3, "src_length": 96, "max_length": 200, "data_cache": False, "disable_tqdm": True,
    "dataset_name_or_path": str(PAIRS), "validation_split": 4,
}  # fmt: skip
KEPT = ("checkpoint-3", "train_log.jsonl", "arguments.json", REFERENCE_FILE)
METHODS = {
    "full": {"loss_type": "sigmoid"},
    "lora": {
        "loss_type": "kto",
        "lora": True,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "disable_dropout": False,
        "zero_padding": True,
    },
    "prefix": {"loss_type": "ipo", "prefix_tuning": True, "num_prefix_tokens": 4},
    "quantised": {"loss_type": "sigmoid", "lora": True, "lora_rank": 4, "weight_quantize_algo": "nf4"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    """Argument file and output folder of a finished run of each method."""
    folder, found = tmp_path_factory.mktemp("alignment"), {}

    def run(method: str) -> tuple[Path, Path]:
        if method not in found:
            out = folder / method
            places = {"model_name_or_path": str(tiny_llama), "output_dir": str(out)}
            file = write_arguments(folder / f"{method}.json", **COMMON | METHODS[method] | places)
            assert run_entry(file) == 0
            found[method] = file, out
        return found[method]

    return run


def read_reference(out: Path) -> dict[str, np.ndarray]:
    with np.load(out / REFERENCE_FILE, allow_pickle=False) as file:
        return {name.split()[0]: file[name] for name in file.files}


@pytest.mark.parametrize("method", METHODS)
def test_rewards_begin_at_zero_and_rise(trained, method):
    _, out = trained(method)
    records = read_log(out)
    assert len(records) == 6
    assert abs(records[0]["rewards_margin"]) < 1e-4 if method != "lora" else True
    assert records[0]["logps_chosen"] < 0
    evaluations = read_log(out, "eval")
    assert [each["step"] for each in evaluations] == [3, 6]
    assert evaluations[1]["eval_rewards_margin"] > 0
    assert 0 <= evaluations[1]["eval_rewards_accuracy"] <= 1
    tables = read_reference(out)
    assert set(tables) == {"train", "dev"} and all((table < 0).all() for table in tables.values())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_continues_has_the_same_digits(trained, method, tmp_path, capfd):
    file, out = trained(method)
    expected, evaluations, table = losses(out), read_log(out, "eval"), (out / REFERENCE_FILE).read_bytes()
    for entry in out.iterdir():
        if entry.name not in KEPT:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    capfd.readouterr()
    assert run_entry(file) == 0
    told = capfd.readouterr().err
    assert "Continuing from" in told and "computed anew" not in told
    assert losses(out) == expected
    assert (out / REFERENCE_FILE).read_bytes() == table
    for mine, theirs in zip(read_log(out, "eval"), evaluations, strict=True):
        assert mine | {"eval_seconds": 0} == theirs | {"eval_seconds": 0}

    for entry in out.iterdir():  # and where the file is lost, it is made of the first weights again
        if entry.name not in KEPT[:-1]:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    assert run_entry(file) == 0
    assert "the reference log-probabilities of train are not in the output folder" in capfd.readouterr().err
    assert losses(out) == expected


def test_what_was_trained_is_evaluated_against_its_reference(trained, capfd):
    file, out = trained("quantised")
    known = read_log(out, "eval")[-1]["eval_rewards_margin"]
    options = ["--do_train", "false", "--lora_path", out, "--output_dir", out]
    assert run_entry(file, *options) == 0
    found = json.loads((out / "all_results.json").read_text())["eval_rewards_margin"]
    assert found == pytest.approx(known, abs=1e-4) and abs(known) > 1e-3


@pytest.mark.parametrize(("settings", "is_zero"), [({}, True), ({"disable_dropout": False}, False)])
def test_dropout_is_no_difference_from_the_reference(tmp_path, capfd, settings, is_zero):
    model = tmp_path / "opt"
    build_tiny("opt", model, hidden_size=32, num_layers=2, num_heads=4, vocab_size=600, max_length=256)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.3, "dropout": 0.3}))
    places = {"model_name_or_path": str(model), "output_dir": str(tmp_path / "out")}
    more = {
        "loss_type": "sigmoid",
        "do_eval": False,
        "evaluation_strategy": "no",
        "max_steps": 1,
        "lora": True,
    }
    file = write_arguments(tmp_path / "a.json", **COMMON | places | more | {"lora_dropout": 0.5} | settings)
    assert run_entry(file) == 0
    assert (abs(read_log(tmp_path / "out")[0]["rewards_margin"]) < 1e-5) == is_zero
    assert ("lora_dropout 0.5 has no effect with loss_type sigmoid" in capfd.readouterr().err) == is_zero


def test_without_a_reference_none_is_asked(tmp_path, tiny_llama):
    places = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "out")}
    more = {"loss_type": "simpo", "beta": 2.0, "do_eval": False, "evaluation_strategy": "no", "max_steps": 2}
    file = write_arguments(tmp_path / "simpo.json", **COMMON | places | more)
    assert run_entry(file) == 0
    assert not (tmp_path / "out" / REFERENCE_FILE).exists()


# The files of PaddleNLP 3.0's llm/config, but for the paths; see its README of dpo and kto.
PADDLENLP = {
    "train_dataset_path": str(PAIRS / "train.json"), "dev_dataset_path": str(PAIRS / "train.json"),
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "per_device_eval_batch_size": 1,
    "num_train_epochs": 1, "max_steps": 100, "learning_rate": 1e-06, "warmup_steps": 10, "logging_steps": 1,
    "evaluation_strategy": "steps", "save_strategy": "steps", "eval_steps": 100, "save_steps": 100,
    "max_seq_len": 2048, "max_prompt_len": 1024, "bf16": True, "fp16_opt_level": "O2", "do_train": True,
    "do_eval": True, "disable_tqdm": True, "load_best_model_at_end": True, "tensor_parallel_degree": 1,
    "use_flash_attention": False, "recompute": False, "recompute_granularity": "full", "beta": 0.1,
    "greedy_zero_padding": False, "lora": False, "unified_checkpoint": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "loss_type"),
    [
        ({"loss_type": "sigmoid", "label_smoothing": 0.0, "simpo_gamma": 0.5, "pref_loss_ratio": 1.0,
          "sft_loss_ratio": 0.0, "dpop_lambda": 50, "reference_free": False, "ref_model_update_steps": -1}, "sigmoid"),
        ({"desirable_weight": 1.0, "undesirable_weight": 1.0}, "kto"),
        ({}, "sigmoid"),
    ],
)  # fmt: skip
def test_files_of_paddlenlp_mean_the_same_here(tmp_path, tiny_llama, more, loss_type):
    places = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "out")}
    args = parse_arguments([str(write_arguments(tmp_path / "a.json", **PADDLENLP | more | places))])
    assert args.alignment.loss_type == loss_type and args.alignment.sft_loss_ratio == 0
    assert (args.data.max_length, args.data.src_length) == (2048, 1024)
    assert args.training.metric_for_best_model == "loss"


FAULTS = [
    ({"ref_model_update_steps": 100}, "ref_model_update_steps is 100, which this version does not have"),
    ({"eval_with_do_generation": True}, "eval_with_do_generation is true: pairs are evaluated by their rewards"),
    ({"lazy": True, "evaluation_strategy": "no", "do_eval": False, "validation_split": None}, "lazy is true: preference"),
    ({"loss_type": "kto", "reference_free": True}, "loss_type is kto, which has no reference_free"),
    ({"loss_type": "dpo"}, 'loss_type is "dpo"'),
    ({"label_smoothing": 0.5}, "label_smoothing is 0.5: it must be from 0 up to"),
    ({"metric_for_best_model": "accuracy", "load_best_model_at_end": True}, "choose one of loss, rewards_accuracy"),
    ({"pref_loss_ratio": 0}, "nothing would be learned"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "words"), FAULTS)
def test_what_cannot_be_is_refused(tmp_path, tiny_llama, capfd, more, words):
    places = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "out")}
    file = write_arguments(tmp_path / "a.json", **COMMON | {"loss_type": "sigmoid"} | more | places)
    assert run_entry(file) == 2
    assert words.replace("from 0 up to", "from 0") in capfd.readouterr().err


def test_the_best_model_may_be_that_of_the_most_accurate_rewards(tmp_path, tiny_llama):
    places = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "out")}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rewards/accuracies"}
    args = parse_arguments(
        [str(write_arguments(tmp_path / "a.json", **COMMON | METHODS["full"] | best | places))]
    )
    assert args.training.metric_for_best_model == "rewards_accuracy" and args.training.greater_is_better
