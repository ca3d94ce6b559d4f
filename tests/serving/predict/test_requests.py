"""Every format, with and without answers."""

from __future__ import annotations

import json

import pytest

from finetune.errors import UserError
from finetune.serving.predict.requests import read_requests


def read(tmp_path, *rows):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read_requests(path)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"src": "a"}, [("a", "")]),
        ({"src": "a", "tgt": "b"}, [("a", "b")]),
        ({"src": "a", "tgt": None}, [("a", "")]),
        ({"src": ["a"]}, [("a", "")]),
        ({"src": ["a", "c"], "tgt": ["b"]}, [("a", "b"), ("c", "")]),
        ({"instruction": "a", "input": "b"}, [("a\nb", "")]),
        ({"instruction": "a", "history": [["x", "y"]]}, [("x", "y"), ("a", "")]),
        ({"query": "a"}, [("a", "")]),
        ({"messages": [{"role": "user", "content": "a"}]}, [("a", "")]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            [("a", "b")],
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, [("a", "")]),
    ],
)
def test_formats(tmp_path, row, turns):
    (request,) = read(tmp_path, row)
    assert [tuple(turn) for turn in request.conversation.turns] == turns
    assert request.result("z") == {**row, "output": "z"}


def test_an_output_of_the_source_becomes_the_reference(tmp_path):
    (request,) = read(tmp_path, {"instruction": "a", "output": "b"})
    assert request.result("z") == {"instruction": "a", "reference": "b", "output": "z"}
    with pytest.raises(UserError, match="both output and reference are there"):
        read(tmp_path, {"instruction": "a", "output": "b", "reference": "c"})


def test_faults_are_told_together(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, {"src": "a"}, {"src": None}, {"src": ["a", "b"]})
    assert [fault.split(": ")[0][-1] for fault in error.value.faults] == ["2", "3"]
    assert "field 'tgt' is missing" in str(error.value)
    with pytest.raises(UserError, match="src has 3 entries and tgt has 1"):
        read(tmp_path, {"src": ["a", "b", "c"], "tgt": ["x"]})
    with pytest.raises(UserError, match="running text has no prompt: name the field src"):
        read(tmp_path, {"text": "a"})
    with pytest.raises(UserError, match="no known format"):
        read(tmp_path, {"foo": "a"})
    with pytest.raises(UserError, match=r"in\.jsonl is empty: expected lines such as"):
        read(tmp_path)
    with pytest.raises(UserError, match="is no file: give one"):
        read_requests(tmp_path / "none")


@pytest.mark.parametrize("first", [{"src": "a"}, {"instruction": "a"}, {"query": "a"}])
def test_only_fields_of_the_file_are_listed(tmp_path, first):
    with pytest.raises(UserError, match=r"is missing \(fields present: 'foo'; needed"):
        read(tmp_path, first, {"foo": "b"})
