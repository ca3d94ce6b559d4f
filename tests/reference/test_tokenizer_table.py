"""The lines that are compared, and the table that is made of the results."""

from tests.reference.tokenizer_parity import ADDED, collect_lines
from tools.tokenizer_table import render


def test_lines_are_different_and_as_many_as_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": ["x y", {"b": "茶"}], "n": 1}\n{"a": "line\\ntwo"}\n')
    (tmp_path / "b.txt").write_text("first\nsecond\n")
    lines = collect_lines([tmp_path], 4000)
    assert len(lines) == len(set(lines)) == 4000
    assert {"x y", "茶", "first", "line\ntwo"} <= set(lines)
    for name in ADDED:
        for place in (str.startswith, str.endswith):
            assert any(place(line, name) and len(line) > len(name) for line in lines), name


def test_the_table_has_the_last_result_of_each_case():
    record = {
        "family": "llama",
        "vocabulary": "tiny",
        "reader": "fast",
        "lines": 20000,
        "tokens": 7,
        "seconds": 1.0,
    }
    first = record | {"different": {"template": 3, "data": 2, "split": 1}}
    last = record | {"different": {"template": 0, "data": 0, "split": 4}}
    table = render([first, last], ["a"] * 8)
    assert table.splitlines()[2:] == ["| llama | tiny | fast | 20,000 | 7 | 0 | 0 | 4 |"]
