"""From files to records: JSON lines, a JSON array, tables and texts become objects with file and line number.

Memory: JSON lines, CSV and texts hold one record at a time (none over `MAX_RECORD_BYTES`), Parquet and Arrow
some hundred; a JSON array is held as a whole, and so is a file in UTF-16 or UTF-32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.reading import columnar_files, delimited_files
from finetune.data.reading.columnar_files import read_columnar
from finetune.data.reading.delimited_files import read_delimited
from finetune.data.reading.encodings import (
    UTF8_BOM,
    EncodingError,
    describe_broken,
    describe_wide,
    find_wide_encoding,
    is_wide,
    normalise_encoding,
    open_lines,
)
from finetune.data.reading.read_options import DEFAULT_OPTIONS, ReadOptions
from finetune.data.reading.records import (
    MAX_RECORD_BYTES,
    START,
    FaultCollector,
    Position,
    Record,
    describe_length,
    describe_type,
    excerpt_of,
    format_fault,
)
from finetune.data.reading.text_files import holds_json, is_text_file, read_text_file
from finetune.errors import UserError
from finetune.storage.files import open_file

__all__ = ["MAX_RECORD_BYTES", "SUFFIXES", "counts_bytes", "holds_text", "is_list", "read_file"]

SUFFIXES = (".json", ".jsonl", *delimited_files.SUFFIXES, ".txt", *columnar_files.SUFFIXES)
"""The files of a folder that are read, by the ends of their names."""

_LINE_HINT = "; each line must be one whole JSON object"


def read_file(
    file: Path, faults: FaultCollector, start: Position = START, options: ReadOptions = DEFAULT_OPTIONS
) -> Iterator[Record]:
    """Reads one file (a byte-order mark, CRLF and blank lines are tolerated).

    The end of its name says what a file is: CSV, TSV, Parquet, Arrow, or text (unless that begins with a
    JSON object). Any other file is one JSON array where its first character is ``[``, and holds a JSON
    object on each line where it is not.

    Args:
        file: The file.
        faults: Where faults go.
        start: Where reading goes on.
        options: Its encoding, and what a document of a text is.
    """
    try:
        yield from _choose_reader(file, faults, start, options)
    except UserError as error:
        faults.add_file(error.faults[0])
    except OSError as error:
        faults.add_file(f"{file}: cannot be read: {error.strerror or error}")
    except EncodingError as error:
        faults.add_file(f"{file}:1: {error}")


def holds_text(file: Path) -> bool:
    """Whether a file holds documents of text, and no JSON."""
    return is_text_file(file) and not holds_json(_read_head(file))


def is_list(file: Path) -> bool:
    """Whether a file is one JSON list, which can only be read as a whole."""
    if file.suffix.lower() in (*delimited_files.SUFFIXES, *columnar_files.SUFFIXES) or holds_text(file):
        return False
    return _read_head(file).startswith(b"[")


def counts_bytes(file: Path) -> bool:
    """Whether the position in a file is one of its bytes; elsewhere it is a number of records."""
    is_table = file.suffix.lower() in (*delimited_files.SUFFIXES, *columnar_files.SUFFIXES)
    return not (is_table or is_list(file))


def _choose_reader(
    file: Path, faults: FaultCollector, start: Position, options: ReadOptions
) -> Iterator[Record]:
    suffix = file.suffix.lower()
    if suffix in columnar_files.SUFFIXES:
        yield from read_columnar(file, faults, start)
        return
    encoding = normalise_encoding(options.encoding)
    if encoding == "utf-8" and (wide := find_wide_encoding(file)):
        raise EncodingError(describe_wide(wide))
    if suffix in delimited_files.SUFFIXES:
        records = read_delimited(file, faults, encoding)
    elif holds_text(file):
        yield from read_text_file(file, faults, start, replace(options, encoding=encoding))
        return
    elif _begins_with_bracket(file, encoding):
        records = _ArrayReader(file, faults, encoding).read()
    else:
        yield from _read_lines(file, faults, start, encoding)
        return
    yield from (record for record in records if record.end.offset > start.offset)


def _read_head(file: Path) -> bytes:
    """The first bytes of a file behind blanks and a byte-order mark."""
    with open_file(file) as stream:
        head = stream.read(4096).removeprefix(UTF8_BOM).lstrip()
        while not head and (chunk := stream.read(4096)):
            head = chunk.lstrip()
    return head


def _begins_with_bracket(file: Path, encoding: str) -> bool:
    if not is_wide(encoding):
        return _read_head(file).startswith(b"[")
    stream, _ = open_lines(file, encoding)
    return stream.read(4096).lstrip().startswith(b"[")


# --- JSON lines ---


def _read_lines(file: Path, faults: FaultCollector, start: Position, encoding: str) -> Iterator[Record]:
    offset, line_number = start
    stream, encoding = open_lines(file, encoding)
    with stream:
        stream.seek(offset)
        while line := stream.readline(MAX_RECORD_BYTES):
            line_number += 1
            num_bytes = len(line)
            if num_bytes == MAX_RECORD_BYTES:
                num_bytes += _skip_line(stream, line)
            text = line.strip() if offset else line.removeprefix(UTF8_BOM).strip()
            offset += num_bytes
            if not text:
                continue
            try:
                fields = _parse_line(text, num_bytes, encoding)
            except ValueError as error:
                faults.add(format_fault(file, line_number, str(error), excerpt_of(text)))
            else:
                yield Record(file, line_number, fields, text, Position(offset, line_number))


def _skip_line(stream: BinaryIO, line: bytes) -> int:
    """Reads on to the end of an overlong line, and returns how many bytes that took."""
    num_bytes = 0
    while not line.endswith(b"\n") and (line := stream.readline(MAX_RECORD_BYTES)):
        num_bytes += len(line)
    return num_bytes


def _parse_line(line: bytes, num_bytes: int, encoding: str) -> dict[str, Any]:
    """Parses one line; ValueError carries the reason alone."""
    if num_bytes > MAX_RECORD_BYTES:
        raise ValueError(describe_length(num_bytes, "bytes"))
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError:
        raise ValueError(describe_broken(line, encoding)) from None
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        hint = _LINE_HINT if text[0] in "[]{}" else ""
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1}{hint})") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        raise ValueError(f"not usable JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"not a JSON object but {describe_type(fields)}{_LINE_HINT}")
    if "\\u" in text:
        _reject_lone_surrogates(fields)
    return fields


def _reject_lone_surrogates(fields: dict[str, Any]) -> None:
    """Half of a surrogate pair passes the JSON parser, and would only fail later, inside a tokenizer."""
    try:
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not text (a \\ud800-\\udfff escape without its other half)") from None
    except RecursionError as error:
        raise ValueError(f"not usable JSON ({error})") from None


# --- JSON array ---


class _ArrayReader:
    """Reads ``[{...}, {...}]``; behind text that is no JSON nothing can be made out, so reading ends there."""

    def __init__(self, file: Path, faults: FaultCollector, encoding: str):
        self._file, self._faults = file, faults
        stream, self._encoding = open_lines(file, encoding)
        with stream:
            content = stream.read().removeprefix(UTF8_BOM)
        # Bytes that are no text become lone surrogates, which spoil only the record they are in.
        self._text = content.decode(self._encoding, "surrogateescape")
        self._is_broken = _has_surrogates(self._text)
        self._counted_to, self._line_number = 0, 1

    def read(self) -> Iterator[Record]:
        text = self._text
        decoder = json.JSONDecoder()
        place = self._skip_blanks(self._skip_blanks(0) + 1)
        num_records = 0
        while not text.startswith("]", place):
            line_number = self._line_of(place)
            try:
                value, end = decoder.raw_decode(text, place)
            except json.JSONDecodeError as error:
                self._add_broken(place, error.pos, error.msg)
                return
            except (ValueError, RecursionError) as error:
                self._add(line_number, place, f"not usable JSON ({error})")
                return
            num_records += 1
            try:
                self._check(value, place, end)
            except ValueError as error:
                self._add(line_number, place, str(error))
            else:
                raw = text[place : min(end, place + 80)]
                yield Record(self._file, line_number, value, raw, Position(num_records, line_number))
            end = self._skip_blanks(end)
            if not text.startswith((",", "]"), end):
                self._add_broken(place, end, "Expecting ',' or ']'")
                return
            place = self._skip_blanks(end + 1) if text[end] == "," else end
        self._check_end(place + 1)

    def _check(self, value: Any, place: int, end: int) -> None:
        if end - place > MAX_RECORD_BYTES:
            raise ValueError(describe_length(end - place, "characters"))
        if not isinstance(value, dict):
            raise ValueError(f"not a JSON object but {describe_type(value)}; a list must hold objects")
        if self._is_broken and _has_surrogates(text := self._text[place:end]):
            raise ValueError(describe_broken(text.encode(self._encoding, "surrogateescape"), self._encoding))
        if self._text.find("\\u", place, end) >= 0:
            _reject_lone_surrogates(value)

    def _check_end(self, place: int) -> None:
        rest = self._skip_blanks(place)
        if rest < len(self._text):
            reason = "text behind the end of the JSON list; give one list, or one object on each line"
            excerpt = excerpt_of(self._text[rest : rest + 80])
            self._faults.add_file(format_fault(self._file, self._line_of(rest), reason, excerpt))

    def _add_broken(self, place: int, fault_place: int, reason: str) -> None:
        if self._skip_blanks(fault_place) >= len(self._text):
            reason = "the file ends inside its list"
        column = fault_place - self._text.rfind("\n", 0, fault_place)
        self._add(self._line_of(fault_place), place, f"not JSON ({reason} at character {column} of the line)")

    def _add(self, line_number: int, place: int, reason: str) -> None:
        excerpt = excerpt_of(self._text[place : place + 80])
        self._faults.add(format_fault(self._file, line_number, reason, excerpt))

    def _line_of(self, place: int) -> int:
        """The line of a place that is not before one asked for earlier."""
        self._line_number += self._text.count("\n", self._counted_to, place)
        self._counted_to = max(place, self._counted_to)
        return self._line_number

    def _skip_blanks(self, place: int) -> int:
        while self._text[place : place + 1] in (" ", "\n", "\r", "\t"):
            place += 1
        return place


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
