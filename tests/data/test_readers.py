"""Containers, and input that is broken in every way: a UserError with file and line, or skipped, nothing else."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.data.reading.formats import FORMATS, ReadOptions, read_conversations
from finetune.data.reading.readers import MAX_RECORD_BYTES, read_file
from finetune.data.reading.records import MAX_FAULTS, FaultCollector
from finetune.errors import UserError
from tests.data.conftest import read_records

GOOD = {"src": "a", "tgt": "b"}


def faults_of(file):
    with pytest.raises(UserError) as caught:
        read_records(file)
    return caught.value.faults


def test_array_with_line_numbers(tmp_path):
    file = tmp_path / "train.json"
    file.write_bytes(b'\xef\xbb\xbf\r\n [\r\n{"a":\r\n1},{"a": 2},\r\n\r\n{"a": 3}]\r\n')
    assert [(r.fields["a"], r.line_number) for r in read_records(file)] == [(1, 3), (2, 4), (3, 6)]


@pytest.mark.parametrize("content", ["[]", " [ \n ] ", "", "\n\n"])
def test_no_records(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert read_records(tmp_path / "a.json") == []


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b'[{"a": 1},\n{"a": ', 2, "not JSON (the file ends inside its list"),
        (b'[{"a": 1},\n', 2, "not JSON (the file ends inside its list"),
        (b'[{"a": 1}\n{"a": 2}]', 2, "not JSON (Expecting ',' or ']' at character 1 of the line)"),
        (b'[{"a": 1},\n{"a": nul}]', 2, "not JSON (Expecting value at character 7 of the line)"),
        (b'[{"a": 1},\n]', 2, None),
        (b'[{"a": 1},\n5]', 2, "not a JSON object but a number; a list must hold objects"),
        (b'[{"a": 1},\n{"a": "\xff"}]', 2, "not UTF-8 (0xff at byte "),
        (b'[{"a": 1},\n{"a": "\\ud83d"}]', 2, "not text (a \\ud800-\\udfff escape without its other half)"),
        (b'[{"a": 1}]\n{"a": 2}', 2, "text behind the end of the JSON list"),
        (b"[" * 100_000, 1, "not "),
        (b'[{"a": ' + b"9" * 5000 + b"}]", 1, "not usable JSON"),
    ],
)
def test_faulty_array(tmp_path, content, line, reason):
    file = tmp_path / "train.json"
    file.write_bytes(content)
    if reason is None:  # a comma behind the last object does no harm
        assert len(read_records(file)) == 1
        return
    assert faults_of(file)[0].startswith(f"{file}:{line}: {reason}")


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b"a,b\n1,2\n1,2,3\n", 3, "3 fields, but the first line names 2"),
        (b'a,b\n1,"2\n', 2, "not CSV (unexpected end of data)"),
        (b'a,b\n1,"2"x\n', 2, "not CSV ("),
        (b"a,a\n1,2\n", 1, "the column names of the first line must be different"),
        (b"a,\n1,2\n", 1, "the column names of the first line must be different"),
        (b"a,b\n1,\xff\n", 2, "not UTF-8 (0xff at byte "),
    ],
)
def test_faulty_csv(tmp_path, content, line, reason):
    file = tmp_path / "train.csv"
    file.write_bytes(content)
    assert faults_of(file)[0].startswith(f"{file}:{line}: {reason}")


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "rows.csv"])
def test_reading_goes_on_from_a_position(tmp_path, name):
    rows = [{"a": "é\n" + str(i), "b": "x"} for i in range(7)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    contents = {
        "lines.jsonl": "\ufeff" + "\n\n".join(lines),
        "array.json": "[" + ",\n".join(lines) + "]",
        "rows.csv": "a,b\n" + "\n".join(f'"{row["a"]}",x' for row in rows),
    }
    file = tmp_path / name
    file.write_text(contents[name], encoding="utf-8")
    records = list(read_file(file, FaultCollector()))
    assert [record.fields for record in records] == rows
    for position, record in enumerate(records):
        assert list(read_file(file, FaultCollector(), record.end)) == records[position + 1 :]


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "rows.csv"])
def test_record_of_50_megabytes(tmp_path, name):
    huge = b"x" * (50 * 2**20)
    contents = {
        "lines.jsonl": b'{"src": "a", "tgt": "b"}\n{"src": "' + huge + b'"}\n{"src": "a", "tgt": "b"}',
        "array.json": b'[{"src": "a", "tgt": "b"},\n{"src": "' + huge + b'"},\n{"src": "a", "tgt": "b"}]',
        "rows.csv": b"src,tgt\na,b\n" + huge + b",b\na,b\n",
    }
    file = tmp_path / name
    file.write_bytes(contents[name])
    line = 3 if name == "rows.csv" else 2
    assert (
        faults_of(file)[0].startswith(f"{file}:{line}: ") and len(faults_of(file)[0]) < len(str(file)) + 300
    )
    faults = FaultCollector(skip=True)
    assert len(read_conversations([file], faults=faults)) == 2
    assert faults.num_faults == 1


def test_json_lines_are_streamed(tmp_path):
    file = tmp_path / "train.jsonl"
    line = json.dumps({"src": "a" * 1000, "tgt": "b"}) + "\n"
    file.write_text(line * 20_000 + '{"src": "' + "x" * (2 * MAX_RECORD_BYTES) + '"}\n')
    tracemalloc.start()
    num_records = sum(1 for _ in read_file(file, FaultCollector()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_records == 20_000 and file.stat().st_size > 50_000_000
    assert peak < 3.5 * MAX_RECORD_BYTES


# --- fuzz ---

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
FIELD_NAMES = """src tgt instruction input output history system query response messages conversations text chosen
rejected role content from value tools tool_calls function name arguments context prompt"""
NAMES = st.sampled_from(FIELD_NAMES.split())
ROLES = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation"]
)
MESSAGES = st.fixed_dictionaries({"role": st.one_of(ROLES, SCALARS), "content": SCALARS})
VALUES = st.recursive(
    st.one_of(SCALARS, MESSAGES),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
ROWS = st.lists(st.one_of(st.dictionaries(NAMES, VALUES, max_size=6), VALUES, st.just(GOOD)), max_size=6)
FUZZ = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def check_file(file, **options):
    """Reading fails with faults that name the file and a line, or succeeds; skipping never fails on a line."""
    options = ReadOptions(**options)
    try:
        read = read_conversations([file], options)
    except UserError as error:
        starts = (
            f"{file}:",
            "... and ",
            "1 example is marked",
            f"{len(error.faults) - 1} examples are marked",
        )
        assert error.faults and all(fault.startswith(starts) for fault in error.faults)
        assert all(
            fault[len(str(file)) + 1].isdigit() for fault in error.faults if fault.startswith(str(file))
        )
        read = None
    faults = FaultCollector(skip=True)
    try:
        skipped = read_conversations([file], options, faults)
    except UserError as error:
        assert any(
            told in str(error) for told in ("preference pairs", "behind the end", "by its first bytes")
        )
        return
    assert read is None or (read == skipped and not faults.num_faults)
    assert read is not None or faults.num_faults


@FUZZ
@given(
    rows=ROWS,
    kind=st.sampled_from(["lines", "array"]),
    name=st.sampled_from([None, *FORMATS]),
    chosen=st.booleans(),
)
def test_any_json(tmp_path, rows, kind, name, chosen):
    file = tmp_path / "train.json"
    lines = [json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) if kind == "lines" else "[" + ",\n".join(lines) + "]")
    check_file(file, dataset_format=name, preference="chosen" if chosen else None)


@FUZZ
@given(data=st.data(), suffix=st.sampled_from([".json", ".jsonl", ".csv"]))
def test_any_damage(tmp_path, data, suffix):
    text = "src,tgt\n" + 'a,"b\nc"\n' * 3 if suffix == ".csv" else (json.dumps(GOOD) + "\n") * 3
    if suffix == ".json":
        text = "[" + text.strip().replace("\n", ",\n") + "]"
    content = bytearray(text.replace("\n", data.draw(st.sampled_from(["\n", "\r\n"]))).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        change = data.draw(st.binary(max_size=4))
        content[place : place + data.draw(st.integers(0, 8))] = change
    file = tmp_path / f"train{suffix}"
    file.write_bytes(
        data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
        + content[: data.draw(st.integers(0, len(content)))]
    )
    check_file(file)


@FUZZ
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".json", ".csv"]))
def test_any_bytes(tmp_path, content, suffix):
    file = tmp_path / f"train{suffix}"
    file.write_bytes(content)
    check_file(file)


@pytest.mark.parametrize(
    ("num_more", "line"), [(0, None), (1, "... and 1 more faulty line."), (2, "... and 2 more faulty lines.")]
)
def test_faults_beyond_the_limit_are_counted(num_more, line):
    faults = FaultCollector()
    for number in range(MAX_FAULTS + num_more):
        faults.add(f"fault {number}")
    with pytest.raises(UserError) as error:
        faults.raise_if_any()
    assert list(error.value.faults) == [*(f"fault {n}" for n in range(MAX_FAULTS)), *([line] if line else [])]
