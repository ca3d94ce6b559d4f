"""`init`: a file that a run reads, from a shipped one, from options, or from answers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from finetune.commands import first_arguments, init
from finetune.commands.first_arguments import FirstArguments, count_weights, fit_to_machine, look_at_data
from finetune.errors import UserError
from finetune.settings.arguments import parse_arguments
from finetune.settings.yaml_output import format_yaml
from finetune.settings.yaml_text import parse_yaml
from finetune.storage.shipped_files import sample_data, shipped_arguments
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first_arguments, "detect_device", lambda requested: requested or "cpu")


def written(name: str) -> dict:
    return json.loads(Path(name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(shipped_arguments()))
def test_every_shipped_file_becomes_one_that_a_run_reads(name):
    init.main([name, "--sample_data", "--model_name_or_path", "m/x", "--max_steps", "3"])
    file = f"{name.replace('/', '_')}_argument.json"
    args = parse_arguments([file])
    assert args.training.max_steps == 3 and args.model.model_name_or_path == "m/x"
    assert (sample_data() / "train.json").read_bytes() == Path("data/train.json").read_bytes()


@pytest.mark.parametrize("lang, comment", [("en", "# Peak learning rate."), ("zh", "# 最大学习率。")])
def test_yaml_says_the_same_with_comments(lang, comment, monkeypatch):
    monkeypatch.setenv("FINETUNE_LANG", lang)
    init.main(["llama/lora", "--sample_data"])
    init.main(["--output_file", "run.yaml", "llama/lora", "--sample_data"])  # the name may stand last
    assert parse_yaml(Path("run.yaml").read_text(encoding="utf-8"))[0] == written("llama_lora_argument.json")
    assert comment in Path("run.yaml").read_text(encoding="utf-8").splitlines()
    init.main(["run.yaml", "--output_file", "again.json"])
    assert written("again.json") == written("llama_lora_argument.json")


@pytest.mark.parametrize(
    "value",
    ["no", "yes", "null", "~", "1e-5", "010", "", " a ", "a: b", "a #b", "- a", "*a", "&a", "!x", "%", "@", "`", "{", "[1]", "'", '"', "a\nb",
     "\u2028", "\x07", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "C:\\x", "中文：值", "---", "2024-01-01", "=", "<<", "?"],
)  # fmt: skip
def test_every_text_is_read_back_from_yaml(value):
    values = {"system": value, "dataset_mix": [{"path": value, "ratio": 0.5}], "learning_rate": 1e-05}
    assert parse_yaml(format_yaml(values))[0] == values


def test_model_and_data_decide(tiny_llama, capsys):
    init.main(
        ["--model_name_or_path", str(tiny_llama), "--dataset_name_or_path", str(ROOT / "data/preference")]
    )
    values = written("llama_dpo_argument.json")
    assert values["loss_type"] == "sigmoid" and values["output_dir"] == "./checkpoints/llama_dpo"
    text = capsys.readouterr().out
    assert "pairs of a better and a worse answer" in text and "preview llama_dpo_argument.json" in text
    assert "bf16" not in values and "fp16_opt_level" not in values


def test_of_a_multimodal_model_the_text_part_is_chosen(tiny_llama, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(tiny_llama, folder)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    init.main(["--model_name_or_path", str(folder), "--dataset_name_or_path", str(ROOT / "data")])
    assert written("llama_lora_argument.json")["text_only"] is True


def test_one_file_without_a_dev_split_gets_a_part_held_back(tiny_llama, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"src": "a", "tgt": "b"}\n' * 3, encoding="utf-8")
    init.main(
        ["--model_name_or_path", str(tiny_llama), "--dataset_name_or_path", str(data), "--lora", "false"]
    )
    values = written("llama_lora_argument.json")
    assert values["validation_split"] == 0.05 and values["lora"] is False
    assert parse_arguments(["llama_lora_argument.json"]).data.validation_split == 0.05


def test_questions_are_asked_on_a_terminal(tiny_llama, monkeypatch):
    answers = iter(["", str(tiny_llama), str(ROOT / "data"), "sft"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    init.main([])
    assert "lora" not in written("llama_sft_argument.json")
    assert next(answers, None) is None


def test_an_end_of_the_answers_writes_nothing(tmp_path, monkeypatch):
    def end(question: str) -> str:
        raise EOFError

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", end)
    with pytest.raises(UserError, match="nothing was written"):
        init.main([])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "model_name_or_path is missing"),
        (["llama/lorra"], "did you mean llama/lora"),
        (["llama/lora", "--lerning_rate", "1"], 'did you mean "learning_rate"'),
        (["llama/lora", "--learning_rate", "-1"], "learning_rate is -1"),
        (["llama/lora", "--memory", "much"], "write a size such as 24GB"),
        (["llama/lora", "--output_file", "a.txt"], "must end in one of"),
        (["llama/lora", "--sample_data", "--dataset_name_or_path", "x"], "exclude each other"),
        (["--model_name_or_path", "./nothing"], "does not exist"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(UserError, match=message):
        init.main(words)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays():
    init.main(["llama/lora"])
    with pytest.raises(UserError, match="add --overwrite"):
        init.main(["llama/lora"])
    init.main(["llama/lora", "--overwrite", "--seed", "7"])
    assert written("llama_lora_argument.json")["seed"] == 7


def test_degrees_stay_where_the_cards_are(monkeypatch):
    monkeypatch.setattr(first_arguments, "detect_device", lambda requested: "gpu")
    monkeypatch.setattr(first_arguments, "count_visible_gpus", lambda: 4)
    first = FirstArguments({"model_name_or_path": "m/x", "tensor_parallel_degree": 4, "bf16": True})
    fit_to_machine(first)
    assert first.values["tensor_parallel_degree"] == 4 and first.values["bf16"]
    monkeypatch.setattr(first_arguments, "count_visible_gpus", lambda: 2)
    fit_to_machine(first)
    assert "tensor_parallel_degree" not in first.values
    assert first.notes == ["one process instead of 4: runs use 2 cards"]


@pytest.mark.parametrize(
    "share, batch, note",
    [(3.0, 4, "without activations"), (1.5, 1, "memory is short"), (0.9, 4, "memory is not enough")],
)
def test_the_batch_follows_the_memory(tiny_llama, share, batch, note):
    num_weights = count_weights(str(tiny_llama))
    assert num_weights is not None
    values = {
        "model_name_or_path": str(tiny_llama),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    first = FirstArguments(values)
    fit_to_machine(first, memory_bytes=int(num_weights * 16 * share))
    assert first.values["per_device_train_batch_size"] == batch
    assert first.values["per_device_train_batch_size"] * first.values["gradient_accumulation_steps"] == 8
    assert note in first.notes[-1]


def test_marked_answers_are_for_kto(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "label": true}\n', encoding="utf-8")
    assert look_at_data(str(path)).method == "kto"
