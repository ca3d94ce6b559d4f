"""One object of a data file, and the gathering of what is wrong with the others.

Faulty lines do not stop the reading: they are gathered and told all at once, so that a person mends a
file in one go, or they are skipped and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.reading.notes import ReadingNotes
from finetune.errors import UserError

MAX_FAULTS = 20
MAX_RECORD_BYTES = 16 * 2**20
EXCERPT_CHARACTERS = 80


class Position(NamedTuple):
    """Where reading goes on in a file.

    Attributes:
        offset: Bytes already read of JSON lines; records already read of other files.
        line_number: Lines already read.
    """

    offset: int = 0
    line_number: int = 0


START = Position()


@dataclass(frozen=True, slots=True)
class Record:
    """One object of a data file.

    Attributes:
        file: The file it was read from.
        line_number: The line it begins on, counted from 1, blank lines included.
        fields: The object.
        raw: How it begins in the file, for messages.
        end: Where reading goes on behind it.
    """

    file: Path
    line_number: int
    fields: dict[str, Any]
    raw: bytes | str = b""
    end: Position = START

    @property
    def excerpt(self) -> str:
        """The first `EXCERPT_CHARACTERS` characters, printable."""
        return excerpt_of(self.raw)

    def with_fields(self, fields: dict[str, Any]) -> Record:
        """The record with other fields."""
        return replace(self, fields=fields)


class RecordError(UserError):
    """One record that cannot be used; the message carries file, line, reason and excerpt."""

    def __init__(self, record: Record, reason: str):
        super().__init__(format_fault(record.file, record.line_number, reason, record.excerpt))


@dataclass
class FaultCollector:
    """Gathers the faults of many lines, and raises them as one UserError or counts them.

    Attributes:
        skip: Faulty records are left out and counted. What concerns a whole file is raised all the same.
        messages: The first `MAX_FAULTS` faults.
        num_faults: All faults, those not kept included.
        summaries: Lines that go in front of the faults, which count those of one kind.
        notes: What was read by a rule, and what was not used.
    """

    skip: bool = False
    messages: list[str] = field(default_factory=list)
    num_faults: int = 0
    summaries: dict[str, str] = field(default_factory=dict)
    notes: ReadingNotes = field(default_factory=ReadingNotes)
    _of_files: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        """Counts a fault, and keeps its message while there is room."""
        self.num_faults += 1
        if len(self.messages) < MAX_FAULTS:
            self.messages.append(message)

    def add_file(self, message: str) -> None:
        """The same for a fault that makes a file, or the rest of it, unusable."""
        self._of_files.append(message)
        self.add(message)

    def raise_if_any(self) -> None:
        """Raises what was gathered, unless it is to be skipped.

        Raises:
            UserError: With up to `MAX_FAULTS` faults and a last line that counts the others.
        """
        if self.skip and self._of_files:
            raise UserError(self._of_files)
        if self.skip or not self.num_faults:
            return
        faults = [*self.summaries.values(), *self.messages]
        num_others = self.num_faults - len(self.messages)
        if num_others:
            faults.append(f"... and {num_others} more faulty line{'s' if num_others > 1 else ''}.")
        raise UserError(faults)


def format_fault(file: Path, line_number: int, reason: str, excerpt: str) -> str:
    """The one shape of a fault in a data file: ``FILE:LINE: reason: first characters``."""
    fault = f"{file}:{line_number}: {reason}"
    return f"{fault}: {excerpt}" if excerpt else fault


def describe_length(length: int, unit: str) -> str:
    """Why an example that is too long is not read."""
    return f"the example has {length:,} {unit}, at most {MAX_RECORD_BYTES:,} are read: split it into shorter ones"


def make_excerpt(text: str) -> str:
    """The first `EXCERPT_CHARACTERS` characters; what a terminal cannot show is escaped, Chinese is not."""
    head = text[:EXCERPT_CHARACTERS]
    if head.isprintable():
        return head
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in head)


def excerpt_of(raw: bytes | str) -> str:
    """The same of the beginning of a record as it stands in its file."""
    if isinstance(raw, bytes):
        raw = raw[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
    return make_excerpt(raw)


def describe_type(value: object) -> str:
    """The JSON name of a value's type, with its article, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return "bytes" if isinstance(value, bytes) else names.get(type(value), "a number")
