"""Where the examples lie and how their lines are read: a path becomes records with file and line number.

Faulty lines do not stop the reading: they are gathered and told all at once, so that a person mends a
file in one go. Memory: one line at a time, plus the first `MAX_FAULTS` messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError

SPLITS = ("train", "dev")
SUFFIXES = (".json", ".jsonl")
MAX_FAULTS = 20
EXCERPT_CHARACTERS = 80

_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object of a data file.

    Attributes:
        file: The file it was read from.
        line_number: Counted from 1, blank lines included.
        fields: The object.
        excerpt: The first `EXCERPT_CHARACTERS` characters of the line, printable, for messages.
    """

    file: Path
    line_number: int
    fields: dict[str, Any]
    excerpt: str = ""


class RecordError(UserError):
    """One record that cannot be used; the message carries file, line, reason and excerpt."""

    def __init__(self, record: Record, reason: str):
        super().__init__(format_fault(record.file, record.line_number, reason, record.excerpt))


@dataclass
class FaultCollector:
    """Gathers the faults of many lines and raises them as one UserError.

    Attributes:
        messages: The first `MAX_FAULTS` faults.
        num_faults: All faults, those not kept included.
    """

    messages: list[str] = field(default_factory=list)
    num_faults: int = 0

    def add(self, message: str) -> None:
        """Count a fault, and keep its message while there is room."""
        self.num_faults += 1
        if len(self.messages) < MAX_FAULTS:
            self.messages.append(message)

    def raise_if_any(self) -> None:
        """Raise what was gathered.

        Raises:
            UserError: With up to `MAX_FAULTS` faults and a last line that counts the others.
        """
        if not self.num_faults:
            return
        faults = list(self.messages)
        num_others = self.num_faults - len(faults)
        if num_others:
            faults.append(f"... and {num_others} more faulty line{'s' if num_others > 1 else ''}.")
        raise UserError(faults)


def format_fault(file: Path, line_number: int, reason: str, excerpt: str) -> str:
    """The one shape of a fault in a data file: ``FILE:LINE: reason: first characters``."""
    fault = f"{file}:{line_number}: {reason}"
    return f"{fault}: {excerpt}" if excerpt else fault


def make_excerpt(text: str) -> str:
    """The first `EXCERPT_CHARACTERS` characters; what a terminal cannot show is escaped, Chinese is not."""
    head = text[:EXCERPT_CHARACTERS]
    if head.isprintable():
        return head
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in head)


def find_split(path: str | Path, split: str, *, required: bool = True) -> list[Path]:
    """The files that hold one split of a data set.

    In a folder the first of these that exists is taken: ``<split>.json``, ``<split>.jsonl``, the
    ``.json`` and ``.jsonl`` files of the folder ``<split>/`` in the order of their names. A path that
    is itself a file is training data and has no other split.

    Args:
        path: The data set: a folder or a single file.
        split: "train" or "dev".
        required: Whether an absent split is an error; otherwise it gives an empty list. What is there
            but unusable (a missing path, a folder where a file should be, an empty ``<split>/``) is
            an error either way.

    Raises:
        UserError: Nothing usable was found; the message says what was looked for.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    path = Path(path)
    if path.is_file():
        if split == "train":
            return [path]
        files = []
    elif path.is_dir():
        files = _find_in_folder(path, split)
    else:
        raise UserError(
            f"dataset_name_or_path: {path} does not exist. Give a folder with train.json and dev.json "
            "(or train/*.json and dev/*.json), or one file of JSON lines."
        )
    if not files and required:
        raise UserError(_describe_absence(path, split))
    return files


def _find_in_folder(folder: Path, split: str) -> list[Path]:
    for suffix in SUFFIXES:
        file = folder / f"{split}{suffix}"
        if file.is_dir():
            raise UserError(
                f"{file} is a folder, expected a file of JSON lines. "
                f"Rename the folder to {folder / split} to have all .json files in it read."
            )
        if file.is_file():
            return [file]
    parts = folder / split
    if not parts.exists():
        return []
    if not parts.is_dir():
        raise UserError(f"{parts} is a file, expected a folder. Rename it to {folder / (split + '.json')}.")
    files = [f for f in sorted(parts.iterdir()) if f.suffix in SUFFIXES and not f.name.startswith(".")]
    folders = [f for f in files if f.is_dir()]
    if folders:
        raise UserError([f"{f} is a folder, expected a file of JSON lines." for f in folders])
    if not files:
        raise UserError(
            f"{parts} holds no .json or .jsonl file. Put the {split} files there or remove the folder."
        )
    return files


def _describe_absence(path: Path, split: str) -> str:
    if path.is_file():
        return (
            f"{path} is a single file and gives training data only: there is no {split} split. "
            f"Give a folder with train.json and {split}.json instead."
        )
    names = sorted(f.name + ("/" if f.is_dir() else "") for f in path.iterdir())
    found = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"
    return (
        f"{path} has no {split} data: looked for {split}.json, {split}.jsonl and {split}/*.json, "
        f"found {found}. "
        "Rename the file, or give its own path."
    )


def read_records(paths: Iterable[str | Path], faults: FaultCollector | None = None) -> Iterator[Record]:
    """Read files of JSON lines (UTF-8; a byte-order mark, CRLF and blank lines are tolerated).

    Args:
        paths: The files, read in this order.
        faults: Where faults go. A caller that passes a collector raises them itself, after adding its
            own; without one they are raised when the last file has been read.

    Yields:
        The usable records, in file order.

    Raises:
        UserError: Lines that are no UTF-8, no JSON or no object, or files that cannot be opened.
    """
    collector = FaultCollector() if faults is None else faults
    for path in paths:
        yield from _read_file(Path(path), collector)
    if faults is None:
        collector.raise_if_any()


def _read_file(file: Path, faults: FaultCollector) -> Iterator[Record]:
    try:
        with file.open("rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                if line_number == 1:
                    line = line.removeprefix(_UTF8_BOM)
                line = line.strip()
                if not line:
                    continue
                excerpt = make_excerpt(line[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace"))
                try:
                    fields = _parse_line(line)
                except ValueError as error:
                    faults.add(format_fault(file, line_number, str(error), excerpt))
                else:
                    yield Record(file, line_number, fields, excerpt)
    except OSError as error:
        faults.add(f"{file}: cannot be read: {error.strerror or error}")


def _parse_line(line: bytes) -> dict[str, Any]:
    """Parse one line; ValueError carries the reason alone."""
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
        hint = "; each line must be one whole JSON object" if text[0] in "[]{}" else ""
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1}{hint})") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        raise ValueError(f"not usable JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(
            f"not a JSON object but {describe_type(fields)}; each line must be one whole JSON object"
        )
    if "\\u" in text:
        _reject_lone_surrogates(fields)
    return fields


def _reject_lone_surrogates(fields: dict[str, Any]) -> None:
    """Half of a surrogate pair passes the JSON parser, and would only fail later, inside a tokenizer."""
    try:
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not text (a \\ud800-\\udfff escape without its other half)") from None


def describe_type(value: object) -> str:
    """The JSON name of a value's type, with its article, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
