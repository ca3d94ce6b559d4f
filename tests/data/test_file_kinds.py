"""Files of other kinds and in other encodings."""

import codecs

import pyarrow
import pytest
from pyarrow import parquet

from finetune.data.reading.conversation import make_conversation
from finetune.data.reading.formats import read_conversations
from finetune.data.reading.read_options import TEXT_DOCUMENTS, ReadOptions
from finetune.data.reading.readers import read_file
from finetune.data.reading.records import FaultCollector
from finetune.errors import UserError

LINE = '{"query": "你好，世界", "response": "再见"}\n'
ROWS = {
    "train.jsonl": LINE * 3,
    "train.json": "[" + ",\n".join([LINE] * 3) + "]",
    "train.csv": "query,response\n" + '"你好，世界",再见\n' * 3,
    "train.tsv": "query\tresponse\n" + "你好，世界\t再见\n" * 3,
}
GREETINGS = [make_conversation([("你好，世界", "再见")])] * 3


def read(file, **options):
    return read_conversations([file], ReadOptions(**options))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("encoding", ["gbk", "GB2312", "gb18030", "utf-16", "UTF-16LE", "utf-8-sig", "utf8"])
def test_encodings(tmp_path, name, encoding):
    file = tmp_path / name
    file.write_bytes(ROWS[name].encode(encoding))
    assert read(file, encoding=encoding) == GREETINGS


@pytest.mark.parametrize("name", ROWS)
def test_gbk_without_the_setting_is_told_with_the_setting(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(ROWS[name].encode("gbk"))
    with pytest.raises(UserError, match=r"not UTF-8 \(0x.. at byte .*looks like GBK: set encoding to gbk"):
        read(file)


@pytest.mark.parametrize("name", [*ROWS, "train.txt"])
@pytest.mark.parametrize(
    ("encoding", "told"), [("utf-16", "utf-16"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be")]
)
def test_utf16_without_the_setting_is_told_once(tmp_path, name, encoding, told):
    file = tmp_path / name
    file.write_bytes("query,response\nabc,defg\n".encode(encoding))
    with pytest.raises(UserError) as caught:
        read(file)
    assert len(caught.value.faults) == 1 and f"set encoding to {told}" in caught.value.faults[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_other_broken_bytes_are_not_taken_for_gbk(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(ROWS["train" + file.suffix].encode().replace("世".encode(), b"\xe4\xb8"))
    with pytest.raises(UserError, match="not UTF-8") as caught:
        read(file)
    assert "looks like" not in str(caught.value)


def test_a_file_that_is_not_in_the_encoding_of_the_setting(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_bytes(LINE.encode() + b'{"query": "\xff", "response": "a"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:2: not gb18030 .*check the setting encoding"):
        read(file, encoding="gbk")
    file.write_bytes(b"\xff\xfe\x00\xd8\x00")
    with pytest.raises(UserError, match=r"not utf-16 .*check the setting encoding"):
        read(file, encoding="utf-16")


# --- texts ---

TEXT = "one\ntwo\n\n \nthree\r\nfour\n\n\nfive"
DOCUMENTS = {
    "line": ["one", "two", "three", "four", "five"],
    "paragraph": ["one\ntwo", "three\nfour", "five"],
    "file": ["one\ntwo\n\n \nthree\nfour\n\n\nfive"],
}


@pytest.mark.parametrize("document", TEXT_DOCUMENTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gbk"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\n"])
def test_documents_of_a_text(tmp_path, document, encoding, end):
    file = tmp_path / "t.txt"
    file.write_bytes((TEXT + end).encode(encoding))
    conversations = read(file, text_document=document, encoding=encoding)
    assert all(each.is_text for each in conversations)
    assert [each.messages[0].content for each in conversations] == DOCUMENTS[document]


@pytest.mark.parametrize("document", TEXT_DOCUMENTS)
def test_reading_a_text_goes_on_from_any_document(tmp_path, document):
    file = tmp_path / "t.txt"
    file.write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    options = ReadOptions(text_document=document)
    records = list(read_file(file, FaultCollector(), options=options))
    assert records[0].fields["text"].startswith("one") and records[0].line_number == 1
    for number, record in enumerate(records, start=1):
        rest = list(read_file(file, FaultCollector(), record.end, options))
        assert rest == records[number:]


def test_a_text_with_a_broken_line_names_it(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes(b"one\n\xfftwo\nthree\n")
    for document in TEXT_DOCUMENTS:
        faults = FaultCollector(skip=True)
        read_conversations([file], ReadOptions(text_document=document), faults)
        assert faults.messages[0].startswith(f"{file}:2: not UTF-8 (0xff at byte 1 of the line")


@pytest.mark.parametrize("content", [LINE * 3, "\n" + ROWS["train.json"], "\ufeff" + LINE * 3])
def test_json_in_a_file_named_text_is_json(tmp_path, content):
    file = tmp_path / "train.txt"
    file.write_text(content, encoding="utf-8")
    assert read(file) == GREETINGS


def test_text_that_begins_with_a_bracket_is_text(tmp_path):
    file = tmp_path / "train.txt"
    file.write_text("[注] 床前明月光\n{brace\n", encoding="utf-8")
    assert [each.messages[0].content for each in read(file)][-1] == "{brace"


# --- tables of Arrow ---

TABLE = {"query": ["q1", None, "q3"], "response": ["a1", "a2", "a3"], "number": [1, 2, None]}


def write_table(file, columns):
    table = pyarrow.table(columns)
    if file.suffix == ".parquet":
        parquet.write_table(table, file, row_group_size=2)
        return
    opened = pyarrow.ipc.new_file if "file" in file.name else pyarrow.ipc.new_stream
    with pyarrow.OSFile(str(file), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("name", ["t.parquet", "stream.arrow", "file.arrow"])
def test_columnar_files(tmp_path, name):
    file = tmp_path / name
    write_table(file, TABLE)
    faults = FaultCollector()
    first, second, third = read_conversations([file], faults=faults)
    assert first == make_conversation([("q1", "a1")]) and third == make_conversation([("q3", "a3")])
    assert second.is_text and (first.line_number, third.line_number) == (1, 3)
    assert faults.notes.unused_fields == {"number": 2}
    records = list(read_file(file, FaultCollector()))
    for number, record in enumerate(records, start=1):
        assert list(read_file(file, FaultCollector(), record.end)) == records[number:]


def test_messages_in_a_columnar_file(tmp_path):
    rows = [[{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]]
    write_table(tmp_path / "t.parquet", {"messages": rows, "conversations": pyarrow.nulls(1), "text": [None]})
    assert read(tmp_path / "t.parquet") == [make_conversation([("问", "答")])]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello" * 50])
def test_damaged_columnar_files(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"not usable as a \.(parquet|arrow) file"):
        read(file)
