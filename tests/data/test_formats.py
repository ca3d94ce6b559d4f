import pytest

from finetune.data.formats import Turn, read_conversations, to_conversation
from finetune.data.source import Record
from finetune.errors import UserError


def faults_of(file):
    with pytest.raises(UserError) as caught:
        read_conversations([file])
    return caught.value.faults


def test_strings_are_one_round(tmp_path):
    record = Record(tmp_path, 3, {"src": "问", "tgt": "答", "id": 5})
    conversation = to_conversation(record)
    assert conversation.turns == (Turn("问", "答"),)
    assert (conversation.system, conversation.file, conversation.line_number) == (None, tmp_path, 3)


def test_lists_are_rounds(tmp_path):
    conversation = to_conversation(Record(tmp_path, 1, {"src": ["a", "b"], "tgt": ["c", "d"]}))
    assert conversation.turns == (Turn("a", "c"), Turn("b", "d"))


@pytest.mark.parametrize(
    "extra", [{"system": "s"}, {"context": {"system": "s"}}, {"system": "s", "context": {"system": "t"}}]
)
def test_system_text(tmp_path, extra):
    assert to_conversation(Record(tmp_path, 1, {"src": "a", "tgt": "b", **extra})).system == "s"


@pytest.mark.parametrize("extra", [{}, {"system": None}, {"context": None}, {"context": {}}])
def test_no_system_text(tmp_path, extra):
    assert to_conversation(Record(tmp_path, 1, {"src": "a", "tgt": "b", **extra})).system is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"src": "a"}, "field 'tgt' is missing (fields present: 'src'; needed: src, tgt)"),
        (
            {"input": "a", "tgt": "b"},
            "field 'src' is missing (fields present: 'input', 'tgt'; needed: src, tgt)",
        ),
        ({}, "field 'src' is missing (fields present: none; needed: src, tgt)"),
        ({"src": 5, "tgt": "b"}, "src is a number, expected a string or a list of strings"),
        ({"src": "a", "tgt": None}, "tgt is null, expected a string or a list of strings"),
        ({"src": "a", "tgt": True}, "tgt is a boolean, expected a string or a list of strings"),
        ({"src": "a", "tgt": {"x": 1}}, "tgt is an object, expected a string or a list of strings"),
        ({"src": ["a", 1], "tgt": ["b", "c"]}, "src[1] is a number, expected a string"),
        ({"src": ["a"], "tgt": [["b"]]}, "tgt[0] is a list, expected a string"),
        ({"src": [], "tgt": []}, "src is an empty list, expected at least one round"),
        ({"src": ["a", "b"], "tgt": ["c"]}, "src has 2 entries and tgt has 1; each round needs one of both"),
        ({"src": ["a", "b"], "tgt": "c"}, "src has 2 entries and tgt has 1; each round needs one of both"),
        ({"src": "a", "tgt": "b", "system": 3}, "system is a number, expected a string"),
    ],
)
def test_faulty_fields(write_lines, fields, reason):
    import json

    file = write_lines({"src": "a", "tgt": "b"}, fields)
    assert faults_of(file) == (f"{file}:2: {reason}: {json.dumps(fields, ensure_ascii=False)[:80]}",)


def test_excerpt_is_the_line_as_it_stands(write_lines):
    line = '{"src":   "' + "长" * 100 + '"}'
    assert faults_of(write_lines(line.encode()))[0].endswith(f"needed: src, tgt): {line[:80]}")


def test_faults_of_both_stages_in_file_order(write_lines):
    first = write_lines({"src": "a"}, b"broken", {"src": "a", "tgt": "b"}, name="1.json")
    second = write_lines(b"\xff", {"src": "a", "tgt": 1}, name="2.json")
    with pytest.raises(UserError) as caught:
        read_conversations([first, second])
    starts = [f.split(" (")[0].split(", ")[0] for f in caught.value.faults]
    assert starts == [
        f"{first}:1: field 'tgt' is missing",
        f"{first}:2: not JSON",
        f"{second}:1: not UTF-8",
        f"{second}:2: tgt is a number",
    ]


def test_count_of_the_rest_covers_both_stages(write_lines):
    file = write_lines(*[b"broken", {"src": "a"}] * 15)
    assert faults_of(file)[-1] == "... and 10 more faulty lines."


def test_duplicates_are_kept(write_lines):
    line = {"src": "a", "tgt": "b"}
    assert len(read_conversations([write_lines(line, line)])) == 2
