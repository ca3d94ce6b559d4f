"""Reward models through the entry script: what a run leaves, continuing, merging, scoring, faults."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.errors import UserError
from finetune.merge.lora import MergeOptions, merge
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.run import PredictOptions, predict
from finetune.settings.arguments import parse_arguments
from finetune.storage.checkpoints import Checkpoint
from tests.conftest import launch, losses, read_log, run_entry, write_arguments
from tests.end_to_end.test_alignment import COMMON, PADDLENLP, PAIRS

REWARD = COMMON | {"loss_type": "reward", "load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
KEPT = ("checkpoint-3", "train_log.jsonl", "arguments.json")
METHODS = {
    "full": {},
    "lora": {"lora": True, "lora_rank": 4, "lora_dropout": 0.1, "zero_padding": True, "learning_rate": 5e-3},
    "quantised": {"lora": True, "lora_rank": 4, "weight_quantize_algo": "nf4", "learning_rate": 5e-3},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    """Argument file and output folder of a finished run of each method."""
    folder, found = tmp_path_factory.mktemp("rewards"), {}

    def run(method: str) -> tuple[Path, Path]:
        if method not in found:
            out = folder / method
            places = {"model_name_or_path": str(tiny_llama), "output_dir": str(out)}
            file = write_arguments(folder / f"{method}.json", **REWARD | METHODS[method] | places)
            if method == "full":  # once as a process of its own
                done = launch("finetune_generation.py", file)
                assert done.returncode == 0, done.stderr[-2000:]
                assert "score.weight takes the place of the output layer" in done.stderr + done.stdout
            else:
                assert run_entry(file) == 0
            found[method] = file, out
        return found[method]

    return run


def results(out: Path) -> dict[str, float]:
    return json.loads((out / "all_results.json").read_text(encoding="utf-8"))


def score(out: Path, data: Path, **model: object) -> list[dict]:
    """The lines that scoring a file writes."""
    predict(
        PredictOptions(
            model=ModelOptions(**{"chat_template": "none"} | model),
            settings=DecodingSettings(),
            data_file=data,
            output_file=out,
            batch_size=3,
        )
    )
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def model_of(method: str, out: Path, base: Path) -> dict[str, object]:
    return (
        {"model_name_or_path": str(out)}
        if method == "full"
        else {"model_name_or_path": str(base), "lora_path": out}
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_its_best_model_scores_files_alike(trained, method, tiny_llama, tmp_path):
    _, out = trained(method)
    records, evaluations = read_log(out), read_log(out, "eval")
    assert len(records) == 6 and all("logps_chosen" not in each for each in records)
    assert evaluations[1]["eval_rewards_margin"] > evaluations[0]["eval_rewards_margin"]
    config = json.loads((out / "config.json").read_text()) if method == "full" else {}
    names = Checkpoint(out).names if method == "full" else {}
    if method == "full":
        assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
        assert names["score.weight"] == (32, 1) and "lm_head.weight" not in names
    # The dev set is the end of the training file; all of it is scored, and the same figures come out.
    lines = (PAIRS / "train.json").read_text(encoding="utf-8").splitlines()
    held_out = read_held_out(trained(method)[0], lines)
    (tmp_path / "dev.json").write_text("\n".join(held_out) + "\n", encoding="utf-8")
    scored = score(tmp_path / "scores.jsonl", tmp_path / "dev.json", **model_of(method, out, tiny_llama))
    margins = np.array([each["reward_chosen"] - each["reward_rejected"] for each in scored])
    found = results(out)
    assert len(margins) == 4
    assert margins.mean() == pytest.approx(found["eval_rewards_margin"], abs=2e-5)
    assert (margins > 0).mean() == found["eval_rewards_accuracy"]


def read_held_out(file: Path, lines: list[str]) -> list[str]:
    """The lines that the run keeps back for evaluation."""
    from finetune.data.reading.splits import find_sources, read_splits

    args = parse_arguments([str(file)])
    sources = find_sources(args.data, training=True, evaluating=True)
    splits = read_splits(
        args.data, sources, seed=args.training.seed, training=True, evaluating=True, comparison="pairs"
    )
    return [lines[each.line_number - 1] for each in splits.dev]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_continues_has_the_same_digits(trained, method, tmp_path, capfd):
    file, out = trained(method)
    expected, evaluations, found = losses(out), read_log(out, "eval"), results(out)
    shutil.copytree(out, tmp_path / "finished")
    for entry in out.iterdir():
        if entry.name not in KEPT:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    capfd.readouterr()
    assert run_entry(file) == 0
    assert "Continuing from" in capfd.readouterr().err
    assert losses(out) == expected
    for mine, theirs in zip(read_log(out, "eval"), evaluations, strict=True):
        assert mine | {"eval_seconds": 0} == theirs | {"eval_seconds": 0}
    assert results(out)["eval_rewards_margin"] == found["eval_rewards_margin"]


@pytest.mark.parametrize("save_format", ["paddle", "hf"])
def test_a_merged_adapter_gives_the_same_rewards(trained, tiny_llama, tmp_path, save_format):
    _, out = trained("lora")
    merge(MergeOptions(tiny_llama, (out,), tmp_path / "merged", save_format=save_format, verify=True))
    data = PAIRS / "train.json"
    apart = score(tmp_path / "apart.jsonl", data, model_name_or_path=str(tiny_llama), lora_path=out)
    merged = score(tmp_path / "merged.jsonl", data, model_name_or_path=str(tmp_path / "merged"))
    for mine, theirs in zip(merged, apart, strict=True):
        for name in ("reward_chosen", "reward_rejected"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["num_labels"] == 1
    assert "lm_head.weight" not in Checkpoint(tmp_path / "merged").names


def test_an_adapter_and_a_reward_model_are_trained_further(trained, tiny_llama, tmp_path, capfd):
    for method, key in (("lora", "lora_path"), ("full", "model_name_or_path")):
        file, out = trained(method)
        capfd.readouterr()
        more = {"learning_rate": 1e-8, "output_dir": str(tmp_path / method), key: str(out), "max_steps": 3}
        assert run_entry(file, *[word for name, value in more.items() for word in (f"--{name}", value)]) == 0
        assert "it is new and drawn" not in capfd.readouterr().err
        found, known = results(tmp_path / method), results(out)
        assert found["eval_rewards_margin"] == pytest.approx(known["eval_rewards_margin"], abs=1e-3)


ROWS = [
    {"src": "这款裙子好吗？", "tgt": "很好。"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
                  {"role": "user", "content": "price?"}, {"role": "assistant", "content": "ten"}]},
    {"prompt": "1+1?", "completion": "2", "label": False},
    {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
    {"query": "1+1?", "response": "2", "rejected_response": ["3", "4"]},
    {"src": ["1+1?"], "tgt": [], "response": ["3", "2"], "sort": [0, 1]},
]  # fmt: skip


def test_every_shape_of_a_line_is_scored(trained, tmp_path):
    _, out = trained("full")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    found = score(tmp_path / "scores.jsonl", data, model_name_or_path=str(out))
    assert [{name: each[name] for name in row} for each, row in zip(found, ROWS, strict=True)] == ROWS
    assert [sorted(each.keys() - row.keys()) for each, row in zip(found, ROWS, strict=True)] == [
        ["reward"] for _ in range(3)
    ] + [["reward_chosen", "reward_rejected"] for _ in range(3)]
    assert (
        found[2]["reward"] == found[3]["reward_chosen"] == pytest.approx(found[4]["reward_chosen"], abs=1e-6)
    )
    assert found[3]["reward_rejected"] == pytest.approx(found[4]["reward_rejected"][0], abs=1e-6)
    assert found[5]["reward_chosen"] == pytest.approx(found[3]["reward_chosen"], abs=1e-6)
    assert len({each.get("reward") for each in found}) > 2


def test_a_killed_scoring_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    from finetune.serving.predict.scoring import Scorer

    _, out = trained("full")
    data, model = PAIRS / "train.json", {"model_name_or_path": str(out)}
    expected = score(tmp_path / "whole.jsonl", data, **model)
    compute, asked = Scorer.rewards, []

    def counting(self, rows, numbers, *, fails_at=None):
        if len(asked) == fails_at:
            raise KeyboardInterrupt
        asked.append(list(numbers))
        return compute(self, rows, numbers)

    monkeypatch.setattr(Scorer, "rewards", functools.partialmethod(counting, fails_at=4))
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "scores.jsonl", data, **model)
    assert not (tmp_path / "scores.jsonl").exists() and len(asked) == 4
    monkeypatch.setattr(Scorer, "rewards", functools.partialmethod(counting))
    assert score(tmp_path / "scores.jsonl", data, **model) == expected
    numbers = [number for batch in asked for number in batch]
    assert sorted(numbers) == list(range(2 * len(expected))), "none is asked for twice"


BAD_ROWS = [
    ({"src": "a", "tgt": ""}, "empty answer"),
    ({"src": "a", "tgt": "b", "reward": 1}, "reward is there already"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "no two answers that differ"),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_lines_that_cannot_be_scored_are_named(trained, tmp_path, row, words):
    _, out = trained("full")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=words) as caught:
        score(tmp_path / "scores.jsonl", data, model_name_or_path=str(out))
    assert "rows.jsonl:1" in caught.value.faults[0]


def test_what_writes_text_refuses_a_reward_model(trained, tiny_llama, tmp_path, capfd):
    from finetune.models.resolve import resolve_model
    from finetune.serving.export.options import ExportOptions
    from finetune.serving.export.run import export
    from finetune.serving.predict.loading import plan_model

    for method in ("full", "lora"):
        _, out = trained(method)
        model = model_of(method, out, tiny_llama)
        with pytest.raises(UserError, match="is a reward model, which gives values and no text"):
            plan_model(ModelOptions(**model))
        with pytest.raises(UserError, match="is a reward model, and a static graph writes text"):
            export(
                ExportOptions(**model, output_path=tmp_path / "out"),
                resolve_model(model["model_name_or_path"]),
            )
        places = {name: str(value) for name, value in model.items()} | {"output_dir": str(tmp_path / "sft")}
        settings = COMMON | {"loss_type": "sigmoid"} | ({"lora": True} if method == "lora" else {})
        assert run_entry(write_arguments(tmp_path / "a.json", **settings | places)) == 2
        assert "set loss_type to reward" in capfd.readouterr().err


FAULTS = [
    ({"prefix_tuning": True}, "a prefix is saved without a head"),
    ({"sft_loss_ratio": 0.5}, "loss_type is reward, which has no sft_loss_ratio"),
    ({"loss_type": "sigmoid", "center_rewards_coefficient": 0.1}, "center_rewards_coefficient is for reward models"),
    ({"metric_for_best_model": "logps_chosen"}, "choose one of loss, rewards_accuracy, rewards_margin"),
    ({"eval_with_do_generation": True}, "pairs are evaluated by their rewards"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "words"), FAULTS)
def test_what_cannot_be_is_refused(tmp_path, tiny_llama, capfd, more, words):
    places = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "out")}
    assert run_entry(write_arguments(tmp_path / "a.json", **REWARD | more | places)) == 2
    assert words in capfd.readouterr().err


PARTS = [
    ({"trainable_parameters": ["score"]}, {"score.weight"}),
    ({"freeze_layers": 2}, {"score.weight", "embed_tokens", "llama.norm"}),
    ({"freeze_parameters": ["embed_tokens", "score"]}, {"norm", "layers."}),
    ({"lora": True, "modules_to_save": ["score", "norm"]}, {"score.weight", "llama.norm.weight", "lora_"}),
    ({"lora": True, "lora_target_modules": "all-linear"}, {"score.weight", "lora_"}),
]


@pytest.mark.parametrize(("more", "trained_names"), PARTS)
def test_the_head_is_a_part_like_others(tmp_path, tiny_llama, more, trained_names):
    """Only the head is trained, or beside others, or none of it."""
    places = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "out")}
    short = {"max_steps": 1, "save_steps": 1, "do_eval": False, "evaluation_strategy": "no"}
    short |= {"load_best_model_at_end": False, "metric_for_best_model": None, "validation_split": None}
    assert run_entry(write_arguments(tmp_path / "a.json", **REWARD | short | more | places)) == 0
    state = moments(tmp_path / "out")
    assert state and all(any(part in name for part in trained_names) for name in state)
    assert all(any(part in name for name in state) for part in trained_names)


def moments(out: Path) -> set[str]:
    """Names of what has a state of the optimizer."""
    names = set()
    for path in (out / "checkpoint-1").glob("optimizer*.safetensors"):
        names |= {name.rpartition("/")[0] for name in load_file(path)}
    return names


def test_an_adapter_without_a_head_is_refused(tmp_path, tiny_llama, capfd):
    from tests.reference.curves import build_adapter

    adapter = build_adapter(tmp_path / "adapter", tiny_llama)
    places = {
        "model_name_or_path": str(tiny_llama),
        "output_dir": str(tmp_path / "out"),
        "lora_path": str(adapter),
    }
    assert run_entry(write_arguments(tmp_path / "a.json", **REWARD | {"lora": True} | places)) == 2
    assert "was not trained with a reward head" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "more", "loss_type"),
    [
        ("rm_flashmask_argument.json", {"flash_mask": False, "benchmark": False, "autotuner_benchmark": False}, "reward"),
        ("rm.json", {}, "reward"),
        ("arm.json", {}, None),
        ("rm_argument.json", {"loss_type": None}, None),
        ("file.json", {"stage": "rm"}, "reward"),
        ("file.json", {"rlhf_type": "rm", "center_rewards_coefficient": 0.01}, "reward"),
    ],
)  # fmt: skip
def test_files_of_others_mean_a_reward_model_here(tmp_path, tiny_llama, name, more, loss_type):
    places = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "out")}
    file = {name: value for name, value in PADDLENLP.items() if name != "beta"} | more | places
    if loss_type is None:
        file["preference"] = "chosen"
    args = parse_arguments([str(write_arguments(tmp_path / name, **file))])
    assert args.alignment.loss_type == loss_type
    if loss_type:
        assert args.training.metric_for_best_model == "loss"


def test_the_best_model_may_be_named_as_trl_names_its_figures(tmp_path, tiny_llama):
    places = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "out")}
    for given, meant in (
        ("accuracy", "rewards_accuracy"),
        ("eval_margin", "rewards_margin"),
        ("loss", "loss"),
    ):
        best = {"metric_for_best_model": given}
        args = parse_arguments([str(write_arguments(tmp_path / "a.json", **REWARD | best | places))])
        assert args.training.metric_for_best_model == meant
        assert args.training.greater_is_better == (meant != "loss")
