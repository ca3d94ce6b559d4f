"""CSV and TSV: rows below a row of column names."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.reading.encodings import describe_broken, open_lines
from finetune.data.reading.records import (
    MAX_RECORD_BYTES,
    FaultCollector,
    Position,
    Record,
    excerpt_of,
    format_fault,
)

SUFFIXES = {".csv": ",", ".tsv": "\t"}


def read_delimited(file: Path, faults: FaultCollector, encoding: str) -> Iterator[Record]:
    """Reads rows: commas (tabs in .tsv) between fields, quotes around those that hold one.

    Raises:
        UserError: The file cannot be read.
        EncodingError: It is no text in a wide encoding.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    delimiter = SUFFIXES[file.suffix.lower()]
    content, encoding = open_lines(file, encoding)
    named = "utf-8-sig" if encoding == "utf-8" else encoding
    with io.TextIOWrapper(content, encoding=named, errors="surrogateescape", newline="") as stream:
        rows = csv.reader(stream, strict=True, delimiter=delimiter)
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
            excerpt = delimiter.join(row)[:80]
            try:
                _check_text(row, delimiter, encoding)
                if names is None:
                    names = _check_names(row)
                    continue
                fields = _name_fields(names, row)
            except ValueError as error:
                shown = excerpt_of(excerpt.encode("utf-8", "surrogateescape"))
                faults.add(format_fault(file, line_number, str(error), shown))
                if names is None:
                    return
                continue
            num_records += 1
            yield Record(file, line_number, fields, excerpt, Position(num_records, last_line))


def _check_text(row: list[str], delimiter: str, encoding: str) -> None:
    """Bytes that are no text in the encoding came as lone surrogates."""
    line = delimiter.join(row)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(describe_broken(line.encode(encoding, "surrogateescape"), encoding)) from None


def _check_names(row: list[str]) -> list[str]:
    names = [name.strip() for name in row]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError("the column names of the first line must be different from one another, none empty")
    if any("\ud800" <= char <= "\udfff" for name in names for char in name):
        raise ValueError("a column name is not text in the encoding of the file")
    return names


def _name_fields(names: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(names):
        raise ValueError(
            f"{len(row)} fields, but the first line names {len(names)}; put quotes around texts with commas"
        )
    return dict(zip(names, row, strict=True))
