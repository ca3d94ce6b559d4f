"""From files to records: JSON lines, a JSON array, or CSV become objects with file and line number.

Memory: JSON lines and CSV hold one record at a time (none over `MAX_RECORD_BYTES`), a JSON array is held
as a whole.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from finetune.data.reading.records import (
    START,
    FaultCollector,
    Position,
    Record,
    describe_type,
    excerpt_of,
    format_fault,
)
from finetune.errors import UserError
from finetune.storage.files import open_file

MAX_RECORD_BYTES = 16 * 2**20

_UTF8_BOM = b"\xef\xbb\xbf"
_LINE_HINT = "; each line must be one whole JSON object"


def read_file(file: Path, faults: FaultCollector, start: Position = START) -> Iterator[Record]:
    """Reads one file (UTF-8; a byte-order mark, CRLF and blank lines are tolerated).

    A name that ends in .csv means CSV with a line of column names; otherwise a file whose first
    character is ``[`` is one JSON array, and any other one holds a JSON object on each line.
    """
    try:
        if file.suffix.lower() == ".csv":
            records = _read_csv(file, faults)
        elif _begins_with_bracket(file):
            records = _ArrayReader(file, faults).read()
        else:
            yield from _read_lines(file, faults, start)
            return
        yield from (record for record in records if record.end.offset > start.offset)
    except UserError as error:
        faults.add_file(error.faults[0])
    except OSError as error:
        faults.add_file(f"{file}: cannot be read: {error.strerror or error}")


def _begins_with_bracket(file: Path) -> bool:
    with open_file(file) as stream:
        head = stream.read(4096).removeprefix(_UTF8_BOM).lstrip()
        while not head and (chunk := stream.read(4096)):
            head = chunk.lstrip()
    return head.startswith(b"[")


# --- JSON lines ---


def _read_lines(file: Path, faults: FaultCollector, start: Position) -> Iterator[Record]:
    offset, line_number = start
    with open_file(file) as stream:
        stream.seek(offset)
        while line := stream.readline(MAX_RECORD_BYTES):
            line_number += 1
            num_bytes = len(line)
            if num_bytes == MAX_RECORD_BYTES:
                num_bytes += _skip_line(stream, line)
            text = line.strip() if offset else line.removeprefix(_UTF8_BOM).strip()
            offset += num_bytes
            if not text:
                continue
            try:
                fields = _parse_line(text, num_bytes)
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


def _parse_line(line: bytes, num_bytes: int) -> dict[str, Any]:
    """Parses one line; ValueError carries the reason alone."""
    if num_bytes > MAX_RECORD_BYTES:
        raise ValueError(_describe_too_long(num_bytes, "bytes"))
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = (
            f"not UTF-8 (0x{line[error.start]:02x} at byte {error.start + 1} of the line; save it as UTF-8)"
        )
        raise ValueError(message) from None
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


def _describe_too_long(length: int, unit: str) -> str:
    return f"the example has {length:,} {unit}, at most {MAX_RECORD_BYTES:,} are read: split it into shorter ones"


def _reject_lone_surrogates(fields: dict[str, Any]) -> None:
    """Half of a surrogate pair passes the JSON parser, and would only fail later, inside a tokenizer."""
    try:
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # from "surrogateescape"
            raise ValueError(f"not UTF-8 (0x{code - 0xDC00:02x}; save the file as UTF-8)") from None
        raise ValueError("not text (a \\ud800-\\udfff escape without its other half)") from None
    except RecursionError as error:
        raise ValueError(f"not usable JSON ({error})") from None


# --- JSON array ---


class _ArrayReader:
    """Reads ``[{...}, {...}]``; behind text that is no JSON nothing can be made out, so reading ends there."""

    def __init__(self, file: Path, faults: FaultCollector):
        self._file, self._faults = file, faults
        # Bytes that are no UTF-8 become lone surrogates, which spoil only the record they are in.
        with open_file(file) as stream:
            self._text = stream.read().removeprefix(_UTF8_BOM).decode("utf-8", "surrogateescape")
        self._is_broken_utf8 = _has_surrogates(self._text)
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
            raise ValueError(_describe_too_long(end - place, "characters"))
        if not isinstance(value, dict):
            raise ValueError(f"not a JSON object but {describe_type(value)}; a list must hold objects")
        if self._is_broken_utf8 or self._text.find("\\u", place, end) >= 0:
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


# --- CSV ---


def _read_csv(file: Path, faults: FaultCollector) -> Iterator[Record]:
    """Rows below a row of column names; commas between fields, quotes around those that hold a comma."""
    csv.field_size_limit(MAX_RECORD_BYTES)
    with (
        open_file(file) as content,
        io.TextIOWrapper(content, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream,
    ):
        rows = csv.reader(stream, strict=True)
        names: list[str] | None = None
        last_line, num_records = 0, 0
        while True:
            line_number = last_line + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                faults.add(format_fault(file, line_number, f"not CSV ({error})", ""))
                last_line = rows.line_num
                if names is None:
                    return
                continue
            last_line = rows.line_num
            if not any(map(str.strip, row)):
                continue
            excerpt = ",".join(row)[:80]
            try:
                if names is None:
                    names = _check_names(row)
                    continue
                fields = _name_fields(names, row)
            except ValueError as error:
                faults.add(format_fault(file, line_number, str(error), excerpt_of(excerpt)))
                if names is None:
                    return
                continue
            num_records += 1
            yield Record(file, line_number, fields, excerpt, Position(num_records, last_line))


def _check_names(row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError("the column names of the first line must be different from one another, none empty")
    return names


def _name_fields(names: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(names):
        raise ValueError(
            f"{len(row)} fields, but the first line names {len(names)}; put quotes around texts with commas"
        )
    fields = dict(zip(names, row, strict=True))
    if any(map(_has_surrogates, row)):
        _reject_lone_surrogates(fields)
    return fields
