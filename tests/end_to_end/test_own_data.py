"""Data in other shapes through the entry script: those of other tools train, faulty ones are refused or skipped."""

from __future__ import annotations

import json

import pytest

from tests.conftest import FAST, losses, run_entry, write_arguments


@pytest.fixture
def run(tiny_llama, tmp_path, capsys):
    def start(**settings):
        base = FAST | {
            "model_name_or_path": str(tiny_llama),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "max_train_samples": 16,
        }
        code = run_entry(write_arguments(tmp_path / "arguments.json", **(base | settings)))
        return code, capsys.readouterr().err

    return start


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("instructions.json", {"chat_template": "alpaca"}),
        ("instructions.json", {"chat_template": "vicuna", "system": "", "truncation": "right"}),
        ("tool_calls.json", {"chat_template": "chatglm2", "train_on": "last"}),
        ("tool_calls.json", {"chat_template": "llama2", "system": "be short"}),
        ("texts.jsonl", {"truncation": "right"}),
        ("preferences.json", {"chat_template": "mistral", "preference": "chosen"}),
    ],
)
def test_data_sets_of_other_tools_train(run, data_sets, tmp_path, name, settings):
    code, stderr = run(dataset_name_or_path=str(data_sets[name]), **settings)
    assert code == 0, stderr
    assert len(losses(tmp_path / "out")) == 2
    assert "Data, train:" in stderr


def test_mixed_skipped_and_held_back(run, tmp_path):
    lines = [json.dumps({"src": f"问{i}", "tgt": "答"}, ensure_ascii=False) for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "broken"]), encoding="utf-8")
    (tmp_path / "b.csv").write_text("query,response\n" + "谁,我\n" * 12, encoding="utf-8")
    code, stderr = run(
        dataset_mix=[
            {"path": str(tmp_path / "a.jsonl"), "ratio": 2},
            {"path": str(tmp_path / "b.csv"), "ratio": 1, "max_samples": 6},
        ],
        on_bad_line="skip", validation_split=4, do_eval=True, chat_template="llama2",
        self_cognition_samples=5, model_name="小桨 Paddy", model_author="The Team",
    )  # fmt: skip
    assert code == 0, stderr
    assert f"skipped: 1 faulty line, the first: {tmp_path / 'a.jsonl'}:13: not JSON" in stderr
    assert "Data, dev: 4 samples from 4 lines" in stderr


def test_template_of_another_family(run, small_data):
    code, stderr = run(dataset_name_or_path=str(small_data), chat_template="qwen")
    assert code == 2
    assert "chat_template qwen writes the special tokens <|im_start|>, <|im_end|>" in stderr
    assert "Traceback" not in stderr


def test_preference_pairs_without_a_choice(run, tmp_path):
    (tmp_path / "p.json").write_text('[{"prompt": "a", "chosen": "b", "rejected": "c"}]')
    code, stderr = run(dataset_name_or_path=str(tmp_path / "p.json"))
    assert code == 2 and "set loss_type to train on them" in stderr and "preference to chosen" in stderr


@pytest.mark.parametrize("lazy", [False, True])
def test_samples_longer_than_the_models_positions_are_refused(tiny_llama, small_data, tmp_path, capsys, lazy):
    lines = [json.dumps({"src": "a", "tgt": "很长的广告" * 200}, ensure_ascii=False)] * 4
    (tmp_path / "train.json").write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "model_name_or_path": str(tiny_llama), "dataset_name_or_path": str(tmp_path), "device": "cpu",
        "output_dir": str(tmp_path / "out"), "do_train": True, "max_steps": 2, "lazy": lazy,
    }  # fmt: skip
    assert run_entry(write_arguments(tmp_path / "arguments.json", **settings)) == 2
    error = capsys.readouterr().err
    assert "this model has positions for 256 only" in error
    assert "set max_length (now 2048) to 256 or less" in error


def test_skipped_lines_are_counted_when_none_is_left(tiny_llama, tmp_path, capsys):
    (tmp_path / "train.json").write_text('{"foo": 1}\n{"foo": 2}\n', encoding="utf-8")
    settings = {
        "model_name_or_path": str(tiny_llama), "dataset_name_or_path": str(tmp_path), "device": "cpu",
        "output_dir": str(tmp_path / "out"), "do_train": True, "max_steps": 2, "on_bad_line": "skip",
    }  # fmt: skip
    assert run_entry(write_arguments(tmp_path / "arguments.json", **settings)) == 2
    error = capsys.readouterr().err
    assert "no example found. 2 lines were skipped, the first: " in error
    assert "train.json:1" in error
