"""Data as other tools' documents show them, from the command line to what is learned."""

from __future__ import annotations

import csv
import json

import pytest

from finetune.data.reading.splits import find_sources, read_splits
from finetune.settings.arguments import parse_arguments
from tests.conftest import FAST, write_arguments


@pytest.fixture
def read(tiny_llama, tmp_path):
    """The examples that a command trains on, with the rules that were applied."""

    def run(dataset, *words):
        path = write_arguments(
            tmp_path / "arguments.json",
            **FAST,
            model_name_or_path=str(tiny_llama),
            dataset_name_or_path=str(dataset),
            output_dir=str(tmp_path / "out"),
            max_steps=1,
            do_eval=False,
            evaluation_strategy="no",
        )
        data = parse_arguments([str(path), *words]).data
        sources = find_sources(data, training=True, evaluating=False)
        splits = read_splits(data, sources, seed=1, training=True, evaluating=False)
        return splits.train, splits.faults["train"].notes

    return run


def contents(conversation):
    return [(message.role, message.content) for message in conversation.messages]


ROWS = [
    {"system": "00000", "query": "33333", "response": "44444", "history": [["11111", "22222"]]},
    {"system": "", "query": "bbbbb", "response": "ccccc", "history": []},
]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_system_and_history_in_each_kind_of_file(read, tmp_path, suffix):
    file = tmp_path / f"swift.{suffix}"
    if suffix == "csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]))
            writer.writeheader()
            writer.writerows([row | {"history": json.dumps(row["history"])} for row in ROWS])
    elif suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        file.write_text(json.dumps(ROWS, indent=2))
    (first, second), _ = read(file)
    assert contents(first) == [
        ("user", "11111"),
        ("assistant", "22222"),
        ("user", "33333"),
        ("assistant", "44444"),
    ]
    assert first.system == "00000" and contents(second) == [("user", "bbbbb"), ("assistant", "ccccc")]


def test_a_table_of_queries_and_responses(read, tmp_path):
    file = tmp_path / "swift.csv"
    file.write_text('\ufeffquery,response\r\n11111,22222\r\n你好,"a, b"\r\n', encoding="utf-8")
    found, _ = read(file)
    assert [contents(each) for each in found] == [
        [("user", "11111"), ("assistant", "22222")],
        [("user", "你好"), ("assistant", "a, b")],
    ]


@pytest.mark.parametrize("rows", [[{"response": "a"}], [{"query": None, "response": "a"}],
                                  [{"messages": [{"role": "assistant", "content": "a"}]}]])  # fmt: skip
def test_answers_alone_continue_the_pre_training(read, write_lines, rows):
    found, notes = read(write_lines(*rows * 2, name="pt.jsonl"))
    assert [contents(each) for each in found] == [[("text", "a")]] * 2
    assert notes.rules == {"examples without a prompt read as running text": 2}


def test_a_list_of_chatml_in_a_file_of_lines(read, tmp_path):
    talk = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"}]  # fmt: skip
    example = {"type": "chatml", "messages": talk, "source": "unknown"}
    file = tmp_path / "chatml.jsonl"
    file.write_text(json.dumps([example] * 2, indent=1))
    found, notes = read(file)
    assert [contents(each) for each in found] == [[("user", "q"), ("assistant", "a")]] * 2
    assert found[0].system == "You are a helpful assistant."
    assert notes.unused_fields == {"type": 2, "source": 2}


@pytest.mark.parametrize(
    "names",
    [["--model_name", "小黄", "Xiao Huang", "--model_author", "魔搭", "ModelScope"],
     ["--model_name", "小黄 Xiao Huang", "--model_author", "魔搭 ModelScope"]],
)  # fmt: skip
def test_two_names_as_two_words(read, write_lines, names):
    file = write_lines({"query": "q", "response": "a"})
    found, _ = read(file, "--self_cognition_samples", "40", *names)
    texts = [each.messages[-1].content for each in found[1:]]
    assert len(texts) == 40
    chinese, english = (
        [text for text in texts if any("\u4e00" <= char <= "\u9fff" for char in text) == is_chinese]
        for is_chinese in (True, False)
    )
    assert any("小黄" in text for text in chinese) and any("魔搭" in text for text in chinese)
    assert any("Xiao Huang" in text for text in english) and any("ModelScope" in text for text in english)
    assert not any("Xiao Huang" in text for text in chinese)


def test_paddlenlps_folder(read, tmp_path):
    folder = tmp_path / "AdvertiseGen"
    folder.mkdir()
    rows = [
        {"src": "类型#裤", "tgt": "宽松"},
        {"src": ["a", "b"], "tgt": ["c", "d"], "context": {"system": "s"}},
    ]
    (folder / "train.json").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "dev.json").write_text("")
    (first, second), notes = read(folder)
    assert first.is_pair and contents(first) == [("user", "类型#裤"), ("assistant", "宽松")]
    assert second.system == "s" and len(second.turns) == 2 and not notes.rules and not notes.unused_fields
