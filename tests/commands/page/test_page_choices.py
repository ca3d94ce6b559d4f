"""From choices to an argument file; needs no Gradio."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.commands import first_arguments
from finetune.commands.page import choices, looks
from finetune.commands.page.choices import METHODS, OFFERED, Choices, compose_arguments
from finetune.commands.page.texts import TEXTS
from finetune.errors import UserError
from finetune.settings.arguments import parse_arguments
from finetune.storage.shipped_files import sample_data


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(first_arguments, "detect_device", lambda requested: requested or "cpu")


def chosen(model, data, arguments="llama/lora", **settings):
    return Choices(model=str(model), data=str(data), arguments=arguments, settings=settings)


def test_what_is_looked_at_is_told(tiny_llama, small_data, tmp_path):
    found = choices.look(str(tiny_llama), str(small_data))
    assert found.family == "llama" and found.method == "lora"
    assert found.lines[0].startswith("model: llama, ") and found.lines[0].endswith("K parameters")
    assert found.lines[1] == "data: 40 records, answers to learn"
    shutil.copy(tiny_llama / "config.json", tmp_path)
    found = choices.look(str(tmp_path), str(small_data / "train.json"))
    assert found.lines[0] == "model: llama, no weights that could be counted"
    assert choices.in_language(found.lines[1], "zh") == "数据：40 条，要学习的回答，没有验证集"


def test_the_data_tell_the_method(tiny_llama):
    folder = sample_data() / "preference"
    assert choices.look(str(tiny_llama), str(folder)).method == "dpo"
    assert choices.choose_arguments("llama", "dpo") == "llama/dpo"
    assert choices.choose_arguments("gemma", "lora") == "llama/lora", "one without files of its own"
    with pytest.raises(UserError, match='no method "sft_pp"'):
        choices.choose_arguments("llama", "sft_pp")


@pytest.mark.parametrize("name", choices.argument_files())
def test_every_offered_file_becomes_one_that_a_run_reads(name, tiny_llama, tmp_path):
    folder = sample_data() / ("preference" if name.partition("/")[2] not in ("lora", "sft", "pt") else "")
    first = compose_arguments(chosen(tiny_llama, folder, name, num_train_epochs="1", learning_rate="1e-4"))
    assert first.values["num_train_epochs"] == 1 and first.values["learning_rate"] == 1e-4
    assert Path(first.values["model_name_or_path"]).is_absolute()
    with choices.written_arguments(first.values) as path:
        args = parse_arguments([str(path)])
    assert args.training.pipeline_parallel_degree <= 1 and not path.exists()


def test_settings_that_are_left_empty_are_the_file_s(tiny_llama, small_data):
    first = compose_arguments(chosen(tiny_llama, small_data, lora_rank="4", max_length=" "))
    assert first.values["lora_rank"] == 4 and "max_length" not in first.values
    assert choices.file_defaults("llama/lora")["num_train_epochs"] == first.values["num_train_epochs"]
    full = compose_arguments(chosen(tiny_llama, small_data, "llama/sft", lora_rank="4"))
    assert "lora_rank" not in full.values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "absent"}, "model absent is no folder"),
        ({"model": ""}, "the model is missing"),
        ({"model": "a\0b"}, "the model is missing"),
        ({"data": "absent"}, "data absent are not there"),
        ({"data": "https://x/y"}, "the data is missing"),
        ({"data": "~nobody_of_this_name/x"}, "names no home folder"),
        ({"arguments": "../../x"}, "no argument file"),
        ({"settings": {"learning_rate": "much"}}, 'learning_rate is "much": a finite number'),
        ({"settings": {"learning_rate": "nan"}}, "learning_rate is"),
        ({"settings": {"output_dir": "/x"}}, "output_dir is no setting of this page"),
    ],
)
def test_what_cannot_be_used_is_told(change, words, tiny_llama, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model": str(tiny_llama), "data": str(small_data), "arguments": "llama/lora"} | change
    with pytest.raises(UserError, match=words):
        compose_arguments(Choices(**given))


def test_models_and_data_nearby_are_offered(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "a" / "model")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.jsonl").write_text("{}\n")
    for hidden in (".git/x", "a/checkpoint-3", "1/2/3/4/5"):
        shutil.copytree(tiny_llama, tmp_path / hidden)
    models, data = choices.find_offers(tmp_path)
    assert models == [str(tmp_path / "a" / "model")]
    assert data == [str(tmp_path / "b"), str(sample_data())]


def test_preview_and_plan_are_those_of_the_commands(tiny_llama, small_data, tmp_path):
    first = compose_arguments(chosen(tiny_llama, small_data))
    assert "[[" in looks.show_preview(first.values, num_samples=1)
    assert "Parameters" in looks.show_plan(first.values)
    (tmp_path / "train.json").write_text(json.dumps({"src": "a", "tgt": "b"}) + "\n{")
    with pytest.raises(UserError, match=r"train\.json"):
        looks.show_preview({**first.values, "dataset_name_or_path": str(tmp_path)})


def test_both_languages_have_all_words():
    assert TEXTS["en"].keys() == TEXTS["zh"].keys()
    for name in OFFERED:
        assert name in TEXTS["en"] and f"{name}_info" in TEXTS["zh"]
    assert all(f"method_{name}" in TEXTS["en"] for name in METHODS)
