"""From a record to a conversation: whatever the shape of the file, the later stages see messages with roles.

The shapes are listed in `FORMATS`; docs/data.md shows an example of each. The shape of a file is that of
its first records unless it is named; where it is not, a record that does not fit and shows another shape by its own
fields is read in that one, and counted.
Fields that a shape does not use are counted and told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.reading import comparisons
from finetune.data.reading.columns import rename_fields, rename_messages
from finetune.data.reading.conversation import ASSISTANT, TEXT, USER, Conversation, Message
from finetune.data.reading.marks import (
    MARKS,
    REJECTED_FIELDS,
    describe_bad_answers,
    is_left_out,
    read_learned,
)
from finetune.data.reading.message_lists import order_messages, read_messages, read_tools
from finetune.data.reading.notes import EMPTY_PROMPT, EXAMPLE_UNLEARNED, OTHER_FORMAT, ReadingNotes
from finetune.data.reading.pairs import (
    SYSTEM_FIELDS,
    describe_missing,
    has_pair,
    note_unused,
    read_pair,
    read_system,
    take_empty_prompt,
)
from finetune.data.reading.preferences import is_preference, read_preference, refuse_preference
from finetune.data.reading.read_options import DEFAULT_OPTIONS, ReadOptions
from finetune.data.reading.readers import read_file
from finetune.data.reading.records import FaultCollector, Record, RecordError, describe_type
from finetune.data.reading.source_target import read_src_tgt
from finetune.data.reading.text_files import is_text_file
from finetune.data.reading.values import is_null, read_text

NUM_RECORDS_LOOKED_AT = 8
_PROMPT_NAMES = ("src", "instruction", "query", "messages", "conversations", "conversation", "prompt")
_PROMPTS = frozenset(_PROMPT_NAMES)
_MARKED = MARKS | REJECTED_FIELDS
_TEXT_NAMES = ("text", "tgt", "response", "content")
_LIST_NAMES = ("conversations", "conversation")


def read_conversations(
    paths: Iterable[str | Path], options: ReadOptions = DEFAULT_OPTIONS, faults: FaultCollector | None = None
) -> list[Conversation]:
    """Reads all examples of some files.

    Args:
        paths: The files.
        options: Their format.
        faults: Where faults go; one that skips keeps count of what was left out.

    Raises:
        UserError: The faults of the lines and of their fields together, in file order.
    """
    faults = FaultCollector() if faults is None else faults
    conversations = [
        conversation
        for path in paths
        for conversation in convert(read_file(Path(path), faults, options=options), faults, options)
    ]
    faults.raise_if_any()
    return conversations


def convert(
    records: Iterable[Record], faults: FaultCollector, options: ReadOptions = DEFAULT_OPTIONS
) -> Iterator[Conversation]:
    """Reads the records of one file, of a format that is named or recognised.

    Raises:
        UserError: The file holds preference pairs and options do not say what to do with them.
    """
    stream = iter(records)
    name = options.dataset_format or options.recognised_format
    while name is None and (first := next(stream, None)) is not None:
        looked_at = [first]
        name = recognise(looked_at, options)
        if name in (None, "text"):  # a later record may show that the first merely lacks its prompt
            looked_at += islice(stream, NUM_RECORDS_LOOKED_AT - 1)
            name = recognise(looked_at, options)
        yield from _convert_all(looked_at, name, faults, options)
    yield from _convert_all(stream, name, faults, options)


def recognise(records: Iterable[Record], options: ReadOptions = DEFAULT_OPTIONS) -> str | None:
    """The format of some records by the names of their fields; None when it is none of ours."""
    own_names = {column: name for name, column in options.columns.items()}
    names, filled = set(), set()
    for record in records:
        for field, value in record.fields.items():
            name = own_names.get(field, "" if field in options.columns else field)
            names.add(name)
            if not is_null(value):
                filled.add(name)
    if is_preference(filled):
        return "preference"
    for format_name, sign in _SIGNS:
        if sign in (filled if format_name in ("messages", "sharegpt") else names):
            return format_name
    if has_pair(names):
        return "query_response"
    return "text" if names & set(_TEXT_NAMES) else None


def to_conversation(
    record: Record, format_name: str | None = "src_tgt", notes: ReadingNotes | None = None
) -> Conversation:
    """Reads one record.

    Raises:
        RecordError: A field is missing or of the wrong type, or the messages are in no usable order.
    """
    if format_name is None:
        present = ", ".join(map(repr, record.fields)) or "none"
        raise RecordError(
            record,
            f"no known format (fields present: {present}; the formats need {_DESCRIPTION}; "
            'name the fields with columns, such as {"prompt": "...", "response": "..."}, and see docs/data.md)',
        )
    return FORMATS[format_name](record, ReadingNotes() if notes is None else notes)


def _convert_all(
    records: Iterable[Record], name: str | None, faults: FaultCollector, options: ReadOptions
) -> Iterator[Conversation]:
    for record in records:
        try:
            conversations = _convert(record, name, faults.notes, options)
        except RecordError as error:
            faults.add(error.faults[0])
            if summary := describe_bad_answers(faults.notes):
                faults.summaries["bad answers"] = summary
            continue
        yield from conversations


def _convert(
    record: Record, name: str | None, notes: ReadingNotes, options: ReadOptions
) -> list[Conversation]:
    """One record by all that the options say; nothing where its marks leave it out."""
    if options.columns or options.dataset_format:
        if options.comparison is None and is_text_file(record.file) and record.fields.keys() == {"text"}:
            return [_read_text(record, notes)]
        record = rename_fields(record, options.columns)
    if options.comparison is not None:
        return _compare(record, name, notes, options)
    if name == "preference" or not _MARKED.isdisjoint(record.fields):
        if name == "preference" or _has_rejected(record):
            if options.preference != "chosen":
                refuse_preference(record)
            name = "preference"
        if is_left_out(record, options.preference, notes):
            return []
    if options.tags:
        record = rename_messages(record, options.tags)
    return [take_empty_prompt(_read_any(record, name, notes, options), notes)]


def _read_any(record: Record, name: str | None, notes: ReadingNotes, options: ReadOptions) -> Conversation:
    """One record in the format of its file, or in the one that its own fields show, unless a format is set."""
    try:
        return to_conversation(record, name, notes)
    except RecordError:
        other = None if options.dataset_format else recognise([record], options)
        if other in (None, name, "preference") or _may_lack_prompt(record, name, other):
            raise
        notes.add(f"{OTHER_FORMAT} ({other} in a file of {name})")
        return to_conversation(record, other, notes)


def _may_lack_prompt(record: Record, name: str | None, other: str | None) -> bool:
    """Whether a record, or those before it, may be no text but lack their prompts, which is a fault."""
    if name == "text":
        return any(field in record.fields for field in _TEXT_NAMES[1:])
    return other == "text" and "text" not in record.fields


def _compare(
    record: Record, name: str | None, notes: ReadingNotes, options: ReadOptions
) -> list[Conversation]:
    """One record of a preference method: its pairs, or its marked answer."""
    if read_learned(record, record.fields, "") is False:
        notes.add(EXAMPLE_UNLEARNED)
        return []
    if options.tags:
        record = rename_messages(record, options.tags)

    def read_one(single: Record, notes: ReadingNotes) -> Conversation:
        if not single.fields.keys().isdisjoint(REJECTED_FIELDS | {"chosen"}):
            return read_preference(single, notes, _read_other)
        if name in (None, "preference", "text"):
            return _read_other(single, notes)
        return to_conversation(single, name, notes)

    found = comparisons.read_comparisons(record, str(options.comparison), notes, read_one)
    return [replace(each, record_end=record.end.offset) for each in found]


def _has_rejected(record: Record) -> bool:
    return any(not is_null(record.fields[name]) for name in record.fields.keys() & REJECTED_FIELDS)


# --- the formats ---


def _read_alpaca(record: Record, notes: ReadingNotes) -> Conversation:
    return read_pair(record, notes, ("instruction", "output"))


def _read_query_response(record: Record, notes: ReadingNotes) -> Conversation:
    return read_pair(record, notes, ("query", "response"))


def _read_messages(record: Record, notes: ReadingNotes) -> Conversation:
    return _of_list(record, "messages", notes)


def _read_sharegpt(record: Record, notes: ReadingNotes) -> Conversation:
    name = next((name for name in _LIST_NAMES if not is_null(record.fields.get(name))), _LIST_NAMES[0])
    return _of_list(record, name, notes)


def _read_text(record: Record, notes: ReadingNotes) -> Conversation:
    prompt = None
    if not _PROMPTS.isdisjoint(record.fields):
        prompt = next((name for name in _PROMPT_NAMES if record.fields.get(name)), None)
    if prompt is not None:
        raise RecordError(
            record,
            f"field {prompt!r} is a prompt, but the first lines of the file have none and were read as text; "
            "set dataset_format, or put the two kinds in different files",
        )
    name = next((name for name in _TEXT_NAMES if name in record.fields), None)
    if name is None:
        raise RecordError(record, describe_missing(record, "text", (" or ".join(_TEXT_NAMES),)))
    if len(record.fields) > 1:
        note_unused(record, MARKS | {name}, notes)
    text = read_text(record, record.fields[name], name, notes)
    if name in ("tgt", "response"):
        notes.add(EMPTY_PROMPT)
    return Conversation((Message(TEXT, text),), None, record.file, record.line_number)


def _read_preference(record: Record, notes: ReadingNotes) -> Conversation:
    return read_preference(record, notes, _read_other)


def _read_other(record: Record, notes: ReadingNotes) -> Conversation:
    name = recognise([record])
    return to_conversation(record, None if name == "preference" else name, notes)


FORMATS: dict[str, Callable[[Record, ReadingNotes], Conversation]] = {
    "src_tgt": read_src_tgt,
    "alpaca": _read_alpaca,
    "query_response": _read_query_response,
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "text": _read_text,
    "preference": _read_preference,
}
# Fields that show a format, the first match counts; text is what has no prompt at all.
_SIGNS: tuple[tuple[str, str], ...] = (
    ("messages", "messages"),
    ("sharegpt", "conversations"),
    ("sharegpt", "conversation"),
    ("src_tgt", "src"),
    ("alpaca", "instruction"),
    ("query_response", "query"),
)
_DESCRIPTION = (
    "src+tgt, instruction+output, query+response, messages, conversations, text, or chosen+rejected"
)
_LIST_USED = frozenset({"messages", *_LIST_NAMES, "tools", *SYSTEM_FIELDS}) | MARKS


# --- parts of records ---


def _of_list(record: Record, name: str, notes: ReadingNotes) -> Conversation:
    if name not in record.fields:
        raise RecordError(record, describe_missing(record, name, (name,)))
    messages = record.fields[name]
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # a cell of a table
        messages = _parse_list(record, messages, name)
    if not isinstance(messages, list):
        raise RecordError(record, f"{name} is {describe_type(messages)}, expected a list of messages")
    if len(record.fields) > 1:
        note_unused(record, _LIST_USED, notes)
    read = read_messages(record, messages, name, notes)
    if [message.role for message in read] == [ASSISTANT]:  # as ms-swift writes text for continued training
        read.insert(0, Message(USER, ""))
    system, ordered = order_messages(record, read, name, notes)
    system = read_system(record, notes, system)
    return Conversation(ordered, system, record.file, record.line_number, read_tools(record))


def _parse_list(record: Record, text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RecordError(
            record, f"{name} is text that is no JSON: write a list of messages as JSON"
        ) from None
