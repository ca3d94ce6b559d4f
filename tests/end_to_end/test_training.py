"""Training through the entry script: the contracts of loss, order, evaluation and best model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from finetune.checkpoints.folder import list_checkpoints
from tests.conftest import FAST, ROOT, losses, read_log, run_entry, write_arguments


@pytest.fixture
def train(tiny_llama, small_data, tmp_path):
    """Runs a training with some settings and gives its output folder."""

    def run(name: str, *, code: int = 0, **settings):
        out = tmp_path / name
        base = FAST | {
            "model_name_or_path": str(tiny_llama),
            "dataset_name_or_path": str(small_data),
            "output_dir": str(out),
            "max_steps": 6,
        }
        assert run_entry(write_arguments(tmp_path / f"{name}.json", **(base | settings))) == code
        return out

    return run


def test_accumulated_micro_batches_give_the_curve_of_the_whole_batch(train):
    whole = train("whole", per_device_train_batch_size=8, max_steps=12)
    parts = train("parts", per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=12)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    for ours, theirs in zip(read_log(parts), read_log(whole), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["num_label_tokens"] == theirs["num_label_tokens"]
        assert ours["num_tokens"] == theirs["num_tokens"]


def test_neftune_is_the_same_however_the_batch_is_cut_and_off_in_evaluation(train):
    evaluate = {"do_eval": True, "neftune": True}
    whole = train("whole", per_device_train_batch_size=8, **evaluate)
    parts = train("parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, **evaluate)
    plain = train("plain", per_device_train_batch_size=8, do_eval=True)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    assert max(abs(a - b) for a, b in zip(losses(whole), losses(plain), strict=True)) > 1e-4
    # Evaluated from the saved weights without the setting, the result is the same: no noise was added.
    again = train(
        "again",
        do_train=False,
        do_eval=True,
        model_name_or_path=str(whole),
        dataset_name_or_path=str(data_of(plain)),
    )
    first, second = (
        json.loads((out / "all_results.json").read_text())["eval_loss"] for out in (whole, again)
    )
    assert first == pytest.approx(second, rel=1e-6)


def data_of(out):
    return json.loads((out / "arguments.json").read_text())["dataset_name_or_path"]


def test_every_epoch_sees_every_sample_once_and_the_last_batch_may_be_smaller(train):
    out = train("epochs", max_steps=-1, num_train_epochs=2, per_device_train_batch_size=12)
    records = read_log(out)
    assert len(records) == 2 * math.ceil(40 / 12)
    per_epoch = [sum(r["num_label_tokens"] for r in records[i : i + 4]) for i in (0, 4)]
    assert per_epoch[0] == per_epoch[1]
    assert records[3]["num_label_tokens"] < records[0]["num_label_tokens"] / 2
    assert [records[3]["epoch"], records[-1]["epoch"]] == [1.0, 2.0]


def test_log_has_every_field_in_full_precision(train):
    out = train("log", max_steps=3, do_eval=True)
    record = read_log(out)[0]
    fields = {"step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "num_label_tokens",
              "tokens_per_second", "seconds", "memory_bytes"}  # fmt: skip
    assert fields <= record.keys()
    assert len(repr(record["loss"])) > 10
    assert record["memory_bytes"] > 100e6
    (evaluation,) = read_log(out, "eval")
    assert evaluation["step"] == 3
    assert evaluation["eval_perplexity"] == pytest.approx(math.exp(evaluation["eval_loss"]))
    assert 0 <= evaluation["eval_accuracy"] <= 1
    assert (out / "loss.png").stat().st_size > 10_000
    rerun = json.loads((out / "arguments.json").read_text())
    assert rerun["max_steps"] == 3


def test_the_last_step_is_always_logged(train):
    out = train("sparse", max_steps=5, logging_steps=3)
    assert [record["step"] for record in read_log(out)] == [3, 5]


def test_loss_evaluation_does_not_depend_on_the_batch_size(train, tiny_llama):
    results = [
        json.loads((train(f"eval{size}", do_train=False, do_eval=True, per_device_eval_batch_size=size)
                    / "all_results.json").read_text())
        for size in (1, 7)
    ]  # fmt: skip
    for name in ("eval_loss", "eval_perplexity", "eval_accuracy"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-6)


def test_generation_evaluation_does_not_depend_on_the_batch_size(train):
    texts = {}
    for size in (1, 4):
        out = train(
            f"generate{size}", do_train=False, do_eval=True, eval_with_do_generation=True,
            save_generation_output=True, per_device_eval_batch_size=size, max_new_tokens=16,
        )  # fmt: skip
        texts[size] = [json.loads(line) for line in (out / "generated_output.json").read_text().splitlines()]
        results = json.loads((out / "all_results.json").read_text())
        assert {"eval_bleu4", "eval_rouge1", "eval_rouge2", "eval_rougel"} <= results.keys()
    assert texts[1] == texts[4]
    assert len(texts[1]) == 10
    assert texts[1][0].keys() == {"source", "output", "target"}


def test_best_model_by_loss_is_the_one_that_is_left(train):
    out = train(
        "best", max_steps=12, evaluation_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=2, learning_rate=8e-3,
        warmup_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    evaluations = read_log(out, "eval")
    best = min(evaluations, key=lambda record: record["eval_loss"])
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == best["eval_loss"]
    assert state["best_model_checkpoint"] == f"checkpoint-{best['step']}"
    left = {path.name for path in list_checkpoints(out)}
    assert left == {"checkpoint-12", f"checkpoint-{best['step']}"} or best["step"] == 12
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)
    assert [record["step"] for record in evaluations] == [2, 4, 6, 8, 10, 12]  # none twice


def test_an_altered_best_checkpoint_is_not_loaded(train, capsys):
    # Turned round on purpose, so that the best checkpoint is the first one.
    settings = {
        "evaluation_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip
    out = train("best", max_steps=6, **settings)
    assert json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"] == "checkpoint-2"
    weights = out / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 7 + b"\1")
    (out / "trainer_state.json").unlink()
    capsys.readouterr()
    train("best", max_steps=6, **settings)
    assert "checkpoint-2 cannot be used: model.safetensors was altered" in capsys.readouterr().err


def test_the_bar_runs_from_the_first_step_to_the_last(train, monkeypatch):
    from finetune.reporting.progress import ProgressReporter

    calls = []
    for name in ("start", "step", "close"):
        method = getattr(ProgressReporter, name)
        monkeypatch.setattr(
            ProgressReporter, name, lambda self, *a, _n=name, _m=method: (calls.append(_n), _m(self, *a))[1]
        )
    train("bar", max_steps=3)
    assert calls[:4] == ["start", "step", "step", "step"]
    assert calls[4] == "close"


@pytest.mark.parametrize("metric", ["accuracy", "bleu4"])
def test_other_metrics_choose_the_best_model(train, metric):
    out = train(
        "metric", max_steps=4, evaluation_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model=metric, eval_with_do_generation=metric == "bleu4",
        max_new_tokens=8,
    )  # fmt: skip
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == max(record[f"eval_{metric}"] for record in read_log(out, "eval"))


@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
def test_a_saved_adapter_gives_the_same_evaluation_when_loaded(train, method):
    path = {"lora": "lora_path", "prefix_tuning": "prefix_path"}[method]
    settings = {method: True, "num_prefix_tokens": 4, "learning_rate": 3e-2}
    out = train("adapter", do_eval=True, **settings)
    again = train("again", do_train=False, do_eval=True, **settings, **{path: str(out)})
    untrained = train("untrained", do_train=False, do_eval=True)
    results = [json.loads((o / "all_results.json").read_text())["eval_loss"] for o in (out, again, untrained)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert abs(results[0] - results[2]) > 1e-3
    assert not (out / "model.safetensors").exists()


def test_trains_on_the_sample_data(train):
    out = train(
        "sample_data", dataset_name_or_path=str(ROOT / "data"), do_eval=True, max_steps=8,
        learning_rate=5e-3, src_length=128, max_length=256,
    )  # fmt: skip
    curve = losses(out)
    assert np.mean(curve[-2:]) < curve[0] - 0.2
