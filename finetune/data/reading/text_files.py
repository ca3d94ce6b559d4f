"""Text files: every document is a record with the field text.

A document is a line (blank ones are none), a paragraph (lines up to a blank one), or the file, as
`ReadOptions.text_document` says. Line ends at the end of a document are not part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from finetune.data.reading.encodings import UTF8_BOM, describe_broken, open_lines
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.records import (
    MAX_RECORD_BYTES,
    FaultCollector,
    Position,
    Record,
    describe_length,
    excerpt_of,
    format_fault,
)

SUFFIX = ".txt"
_JSON = re.compile(rb"\s*(\[\s*)?\{\s*\"")


def is_text_file(file: Path) -> bool:
    """Whether a file's name says that it holds text."""
    return file.suffix.lower() == SUFFIX


def holds_json(head: bytes) -> bool:
    """Whether a file that begins so holds JSON objects, whatever its name says."""
    return _JSON.match(head.removeprefix(UTF8_BOM)) is not None


def read_text_file(
    file: Path, faults: FaultCollector, start: Position, options: ReadOptions
) -> Iterator[Record]:
    """Reads the documents of a file.

    Raises:
        UserError: The file cannot be read.
        EncodingError: It is no text in a wide encoding.
    """
    stream, encoding = open_lines(file, options.encoding)
    offset, line_number = start
    lines: list[bytes] = []
    first_line, num_bytes = line_number + 1, 0
    with stream:
        stream.seek(offset)
        while line := stream.readline(MAX_RECORD_BYTES):
            text = line if offset else line.removeprefix(UTF8_BOM)
            offset += len(line)
            line_number += line.endswith(b"\n")
            is_blank = not line.strip()
            if num_bytes + len(line) <= MAX_RECORD_BYTES:
                lines.append(text)
            num_bytes += len(line)
            ends = options.text_document == "line" or (options.text_document == "paragraph" and is_blank)
            if not ends or not line.endswith(b"\n"):
                continue
            yield from _make_record(file, faults, lines, first_line, num_bytes, encoding, offset, line_number)
            lines, first_line, num_bytes = [], line_number + 1, 0
        yield from _make_record(file, faults, lines, first_line, num_bytes, encoding, offset, line_number)


def _make_record(
    file: Path,
    faults: FaultCollector,
    lines: list[bytes],
    first_line: int,
    num_bytes: int,
    encoding: str,
    offset: int,
    line_number: int,
) -> Iterator[Record]:
    content = b"".join(lines)
    if not content.strip():
        return
    if num_bytes > MAX_RECORD_BYTES:
        reason = describe_length(num_bytes, "bytes")
        faults.add(format_fault(file, first_line, reason, excerpt_of(content)))
        return
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        broken = next((line for line in lines if not _is_text(line, encoding)), content)
        at = first_line + (lines.index(broken) if broken in lines else 0)
        faults.add(format_fault(file, at, describe_broken(broken, encoding), excerpt_of(broken)))
        return
    text = text.replace("\r\n", "\n").rstrip("\r\n")
    yield Record(file, first_line, {"text": text}, content[:320], Position(offset, line_number))


def _is_text(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
