import json

import pytest

from finetune.data.reading.records import MAX_FAULTS, make_excerpt
from finetune.data.reading.source import find_split
from finetune.errors import UserError
from tests.data.conftest import read_records


def faults_of(*paths):
    with pytest.raises(UserError) as caught:
        read_records(*paths)
    return caught.value.faults


# --- find_split ---


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_split_file_in_folder(tmp_path, name):
    (tmp_path / name).write_text("")
    assert find_split(tmp_path, "train") == [tmp_path / name]


def test_split_folder_is_sorted_and_its_notes_are_no_data(tmp_path):
    (tmp_path / "dev").mkdir()
    for name in ("b.json", "a.jsonl", "c.json", "notes.txt", "d.json.bak", ".hidden.json"):
        (tmp_path / "dev" / name).write_text("")
    assert [f.name for f in find_split(tmp_path, "dev")] == ["a.jsonl", "b.json", "c.json"]


def test_file_goes_before_folder(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.json").write_text("")
    (tmp_path / "train.json").write_text("")
    assert find_split(tmp_path, "train") == [tmp_path / "train.json"]


def test_single_file_is_training_data_only(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("")
    assert find_split(file, "train") == [file]
    assert find_split(file, "dev", required=False) == []
    with pytest.raises(UserError, match=r"mine\.txt is a single file .* there is no dev split.*dev\.json"):
        find_split(file, "dev")


def test_absent_split_says_what_was_looked_for_and_found(tmp_path):
    (tmp_path / "testing.json").write_text("")
    (tmp_path / "sub").mkdir()
    assert find_split(tmp_path, "train", required=False) == []
    with pytest.raises(UserError) as caught:
        find_split(tmp_path, "train")
    message = str(caught.value)
    assert str(tmp_path) in message
    assert (
        "looked for train.json, train.jsonl, train.csv and train/*.json, and for other data files" in message
    )
    assert "found sub/, testing.json." in message


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="found nothing"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize("required", [True, False])
def test_missing_path(tmp_path, required):
    with pytest.raises(UserError, match=r"nowhere does not exist\. Give a folder with train\.json"):
        find_split(tmp_path / "nowhere", "train", required=required)


@pytest.mark.parametrize("required", [True, False])
def test_folder_named_like_the_file(tmp_path, required):
    (tmp_path / "train.json").mkdir()
    with pytest.raises(UserError, match=r"train\.json is a folder, expected a file\. Rename"):
        find_split(tmp_path, "train", required=required)


@pytest.mark.parametrize("required", [True, False])
def test_split_folder_without_files(tmp_path, required):
    (tmp_path / "dev").mkdir()
    with pytest.raises(UserError, match=r"dev holds no \.json, .* or \.arrow file"):
        find_split(tmp_path, "dev", required=required)


def test_folder_inside_split_folder(tmp_path):
    (tmp_path / "train" / "part.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"part\.json is a folder"):
        find_split(tmp_path, "train")


def test_file_named_like_the_split_folder(tmp_path):
    (tmp_path / "train").write_text("")
    with pytest.raises(UserError, match=r"train is a file, expected a folder. Rename it to .*train\.json"):
        find_split(tmp_path, "train")


def test_unknown_split_is_a_programming_error(tmp_path):
    with pytest.raises(ValueError, match="'test'"):
        find_split(tmp_path, "test")


# --- records ---


def test_records_carry_file_and_line(write_lines):
    first = write_lines({"a": 1}, b"", b"   ", {"a": "二"}, name="one.json")
    second = write_lines({"a": 3}, name="two.json")
    records = read_records(first, second)
    assert [(r.file, r.line_number, r.fields) for r in records] == [
        (first, 1, {"a": 1}),
        (first, 4, {"a": "二"}),
        (second, 1, {"a": 3}),
    ]


def test_byte_order_mark_and_crlf_and_missing_last_newline(tmp_path):
    file = tmp_path / "windows.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert [(r.line_number, r.fields["a"]) for r in read_records(file)] == [(1, 1), (3, 2)]


def test_line_separators_inside_strings_do_not_split_lines(tmp_path):
    file = tmp_path / "train.json"
    text = "a\u2028b\u0085c\x0bd"
    file.write_text(json.dumps({"a": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [r.fields["a"] for r in read_records(file)] == [text]


def test_empty_file_gives_nothing(write_lines):
    assert read_records(write_lines()) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            b'{"src": "a"',
            "not JSON (Expecting ',' delimiter at character 12; each line must be one whole JSON object)",
        ),
        (b"hello", "not JSON (Expecting value at character 1)"),
        (b'[{"src": "a"}]', "not a JSON object but a list; each line must be one whole JSON object"),
        (b"[", "not JSON (Expecting value at character 2; each line must be one whole JSON object)"),
        (b"null", "not a JSON object but null; each line must be one whole JSON object"),
        (b"17", "not a JSON object but a number; each line must be one whole JSON object"),
        (b'"text"', "not a JSON object but a string; each line must be one whole JSON object"),
    ],
)
def test_faulty_line(write_lines, line, reason):
    file = write_lines({"ok": 1}, b"", line)
    assert faults_of(file) == (f"{file}:3: {reason}: {line.decode()}",)


def test_line_that_is_no_utf8(write_lines):
    file = write_lines("西装".encode("gb18030"))
    (fault,) = faults_of(file)
    assert fault.startswith(
        f"{file}:1: not UTF-8 (0xce at byte 1 of the line; looks like GBK: set encoding to gbk, "
    )
    assert "\\xce" in fault


def test_utf16_file(tmp_path):
    file = tmp_path / "train.json"
    file.write_bytes('{"src": "a"}'.encode("utf-16"))
    assert "not UTF-8 but, by its first bytes, UTF-16: set encoding to utf-16" in faults_of(file)[0]


def test_lone_surrogate(write_lines):
    file = write_lines(b'{"src": "\\ud83d\\ude00"}', b'{"src": "\\ud83d"}')
    (fault,) = faults_of(file)
    assert fault.startswith(f"{file}:2: not text (a \\ud800-\\udfff escape without its other half)")


@pytest.mark.parametrize("line", [b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_json_that_the_parser_cannot_hold(write_lines, line):
    file = write_lines(line)
    assert faults_of(file)[0].startswith(f"{file}:1: not ")


def test_excerpt_is_the_first_80_characters_and_chinese_is_readable(write_lines):
    line = "类型#上衣*版型#显瘦" * 20
    file = write_lines(line.encode())
    assert faults_of(file)[0].endswith(f": {line[:80]}")


@pytest.mark.parametrize("line", ["😀" * 200, "é" * 200, "a😀" * 200])
def test_excerpt_never_cuts_a_character(write_lines, line):
    assert faults_of(write_lines(line.encode()))[0].endswith(f": {line[:80]}")


def test_excerpt_escapes_what_a_terminal_would_obey():
    assert make_excerpt("a\x1b[2J\tb\u202e西") == "a\\x1b[2J\\tb\\u202e西"


def test_all_faults_at_once_with_a_count_of_the_rest(write_lines):
    good = write_lines({"a": 1}, name="good.json")
    bad = write_lines(*[b"oops"] * (MAX_FAULTS + 5), name="bad.json")
    other = write_lines(b"oops", name="other.json")
    faults = faults_of(bad, good, other)
    assert len(faults) == MAX_FAULTS + 1
    assert [f.split(": ")[0] for f in faults[:2]] == [f"{bad}:1", f"{bad}:2"]
    assert faults[-1] == "... and 6 more faulty lines."


def test_exactly_the_limit_needs_no_count(write_lines):
    assert len(faults_of(write_lines(*[b"oops"] * MAX_FAULTS))) == MAX_FAULTS


def test_file_that_cannot_be_opened(tmp_path):
    assert faults_of(tmp_path / "gone.json") == (
        f"{tmp_path / 'gone.json'} cannot be read (No such file or directory): copy it there",
    )


def test_long_line_has_a_short_message(write_lines):
    file = write_lines(b'{"src": "' + b"x" * 5_000_000)
    assert len(faults_of(file)[0]) < len(str(file)) + 250
