"""Which files are a data set: folders without our names, a data set for evaluation, registries of LLaMA-Factory."""

import json
import os
from pathlib import Path

import pytest

from finetune.data.reading.conversation import make_conversation
from finetune.data.reading.source import find_split
from finetune.data.reading.splits import find_sources, read_splits
from finetune.errors import UserError
from finetune.settings.data import DataArguments

PAIR = {"instruction": "q", "input": "", "output": "a"}


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(rows) or [PAIR], ensure_ascii=False), encoding="utf-8")
    return path


def read(evaluating=False, **settings):
    data = DataArguments(**settings)
    sources = find_sources(data, training=True, evaluating=evaluating)
    return read_splits(data, sources, seed=1, training=True, evaluating=evaluating)


def names(folder, split):
    return [str(file.relative_to(folder)) for file in find_split(folder, split, required=False)]


@pytest.mark.parametrize(
    ("files", "train", "dev"),
    [
        (["b.json", "a.jsonl", "c.csv"], ["a.jsonl", "b.json", "c.csv"], []),
        (["x/a.json", "x/y/b.tsv", "z.parquet"], ["x/a.json", "x/y/b.tsv", "z.parquet"], []),
        (["a.json", "val.json", "test.json"], ["a.json"], ["val.json"]),
        (["a.json", "validation-0.jsonl", "x/eval_1.json"], ["a.json"], ["validation-0.jsonl", "x/eval_1.json"]),
        (["train_a.json", "train_b.json", "other.json"], ["train_a.json", "train_b.json"], []),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
         ["data/train-00000-of-00001.parquet"], []),
        (["a.json", "readme.txt", "notes.txt"], ["a.json"], []),
        (["one.txt", "two/three.txt", "README.txt"], ["one.txt", "two/three.txt"], []),
        (["a.json", "config.json", "dataset_infos.json", ".cache/b.json", "x/.c.json", "d.md"], ["a.json"], []),
        (["train.json", "more.json", "dev.csv"], ["train.json"], ["dev.csv"]),
        (["train/a.txt", "train/b.txt", "dev/c.json"], ["train/a.txt", "train/b.txt"], ["dev/c.json"]),
        (["training.json"], ["training.json"], []),
        (["trained.json", "develop.json"], ["develop.json", "trained.json"], []),
    ],
)  # fmt: skip
def test_folders_of_any_files(tmp_path, files, train, dev):
    for name in files:
        write(tmp_path / name)
    assert names(tmp_path, "train") == train and names(tmp_path, "dev") == dev


def test_links_in_a_circle_end(tmp_path):
    write(tmp_path / "d" / "a.json")
    os.symlink(tmp_path / "d", tmp_path / "d" / "again")
    assert names(tmp_path / "d", "train") == ["a.json"]


def test_a_saved_data_set_is_its_arrow_files(tmp_path):
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text('{"features": {"query": {}}}')
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"")
    assert names(tmp_path, "train") == ["data-00000-of-00001.arrow"]


# --- eval_dataset ---


@pytest.mark.parametrize("what", ["file", "folder", "folder with dev", "list"])
def test_evaluation_data_beside_any_training_data(tmp_path, what):
    train = write(tmp_path / "mine.json", PAIR, PAIR, PAIR)
    other = {**PAIR, "output": "b"}
    one, two = write(tmp_path / "one" / "x.json", other), write(tmp_path / "two" / "dev.json", other, other)
    write(tmp_path / "two" / "train.json", PAIR)
    given = {"file": one, "folder": one.parent, "folder with dev": two.parent, "list": f"{one},{two}"}
    splits = read(evaluating=True, dataset_name_or_path=str(train), eval_dataset=str(given[what]))
    assert len(splits.train) == 3
    assert splits.dev == [make_conversation([("q", "b")])] * {"file": 1, "folder": 1, "list": 3}.get(what, 2)


def test_it_goes_before_dev_files_and_validation_split(tmp_path):
    write(tmp_path / "d" / "train.json", PAIR, PAIR)
    write(tmp_path / "d" / "dev.json", PAIR, PAIR)
    other = write(tmp_path / "other.json", PAIR)
    for path in (tmp_path / "d", tmp_path / "d" / "train.json"):
        splits = read(
            evaluating=True, dataset_name_or_path=str(path), eval_dataset=str(other), validation_split=0.5
        )
        assert (len(splits.train), len(splits.dev)) == (2, 1)


def test_a_single_file_without_a_dev_set_names_both_remedies(tmp_path):
    with pytest.raises(UserError, match=r"Set validation_split to hold back .* eval_dataset"):
        read(evaluating=True, dataset_name_or_path=str(write(tmp_path / "a.json")))


# --- dataset_info.json ---

REGISTRY = {
    "mine": {"file_name": "cols.json", "columns": {"prompt": "ques", "response": "ans"}},
    "alpaca": {"file_name": "alpaca.json"},
    "all_columns": {
        "file_name": "all.json",
        "columns": {"prompt": "a", "query": "b", "response": "c", "system": "d", "history": "e"},
    },
    "sharegpt": {"file_name": "sharegpt.json", "formatting": "sharegpt",
                 "columns": {"messages": "dialog", "system": "sys", "tools": "functions"},
                 "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"}},
    "plain_sharegpt": {"file_name": "plain_sharegpt.json", "formatting": "sharegpt"},
    "openai": {"file_name": "openai.json", "formatting": "sharegpt", "columns": {"messages": "messages"},
               "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                        "assistant_tag": "assistant", "system_tag": "system"}},
    "few": {"file_name": "many.json", "num_samples": 2},
    "pairs": {"file_name": "pairs.json", "ranking": True,
              "columns": {"prompt": "instruction", "query": "input", "chosen": "good", "rejected": "bad"}},
    "remote": {"hf_hub_url": "someone/something"},
    "gone": {"file_name": "gone.json"},
    "odd": {"file_name": "cols.json", "formatting": "csv", "columns": {"promt": "ques"}, "load_from": "x"},
}  # fmt: skip
CONTENTS = {
    "cols.json": [{"ques": "q", "ans": "a"}],
    "alpaca.json": [PAIR],
    "all.json": [{"a": "q", "b": "in", "c": "a", "d": "s", "e": [["q1", "a1"]], "prompt": "never"}],
    "sharegpt.json": [{"dialog": [{"who": "me", "what": "q"}, {"who": "it", "what": "a"}], "sys": "s"}],
    "plain_sharegpt.json": [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    ],
    "openai.json": [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    "many.json": [PAIR] * 5,
    "pairs.json": [{"instruction": "q", "input": "", "good": "a", "bad": "b"}],
}
READ = {
    "mine": [make_conversation([("q", "a")])],
    "alpaca": [make_conversation([("q", "a")])],
    "all_columns": [make_conversation([("q1", "a1"), ("q\nin", "a")], "s")],
    "sharegpt": [make_conversation([("q", "a")], "s")],
    "plain_sharegpt": [make_conversation([("q", "a")])],
    "openai": [make_conversation([("q", "a")])],
    "few": [make_conversation([("q", "a")])] * 2,
}


@pytest.fixture
def registry(tmp_path):
    folder = tmp_path / "data"
    for name, rows in CONTENTS.items():
        write(folder / name, *rows)
    (folder / "dataset_info.json").write_text(json.dumps(REGISTRY))
    return folder


@pytest.mark.parametrize("name", READ)
def test_names_of_a_registry(registry, name):
    assert read(dataset_name_or_path=str(registry / name)).train == READ[name]
    assert read(dataset_name_or_path=name, dataset_dir=str(registry)).train == READ[name]


def test_several_names_and_a_mix(registry):
    both = READ["mine"] + READ["sharegpt"]
    assert read(dataset_name_or_path="mine,sharegpt", dataset_dir=str(registry)).train == both
    mixed = [{"path": "mine"}, {"path": str(registry / "sharegpt")}]
    assert read(dataset_mix=mixed, dataset_dir=str(registry)).train == both


def test_a_registry_in_the_folder_one_works_in(registry, monkeypatch):
    monkeypatch.chdir(registry.parent)
    assert read(dataset_name_or_path="mine").train == READ["mine"]
    monkeypatch.chdir(registry)
    assert read(dataset_name_or_path="mine").train == READ["mine"]


def test_a_name_of_a_registry_needs_a_split_or_evaluation_data(registry):
    with pytest.raises(UserError, match=r"has no dev split\. Set validation_split .* eval_dataset"):
        read(evaluating=True, dataset_name_or_path=str(registry / "few"))
    splits = read(evaluating=True, dataset_name_or_path=str(registry / "few"), validation_split=1)
    assert (len(splits.train), len(splits.dev)) == (2, 1)


def test_preference_pairs_of_a_registry(registry):
    path = str(registry / "pairs")
    with pytest.raises(UserError, match="these are preference pairs"):
        read(dataset_name_or_path=path)
    assert read(dataset_name_or_path=path, preference="chosen").train == [make_conversation([("q", "a")])]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("remote", "remote has no file_name but hf_hub_url: download the data"),
        ("gone", "the file_name of gone is gone.json, and"),
        ("odd", "formatting is 'csv', expected one of alpaca"),
        ("odd", "columns: 'promt' is not known"),
        ("odd", "load_from cannot be used here"),
    ],
)
def test_entries_that_cannot_be_used(registry, name, reason):
    with pytest.raises(UserError) as caught:
        read(dataset_name_or_path=str(registry / name))
    assert reason in str(caught.value) and "dataset_info.json" in str(caught.value)


def test_a_folder_with_a_registry_needs_a_name(registry):
    with pytest.raises(
        UserError, match=r"name one of its data sets, such as .*mine \(there are mine, alpaca"
    ):
        read(dataset_name_or_path=str(registry))
