"""From a record to a conversation: whatever the shape of the file, the later stages see messages with roles.

The shapes are listed in `FORMATS`; docs/data.md shows an example of each. The shape of a file is that of
its first records unless it is named, and a record of another shape is a fault: a file is of one shape.
Fields that a shape does not know are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.data.reading.conversation import ASSISTANT, TEXT, USER, Conversation, Message, make_conversation
from finetune.data.reading.message_lists import read_message, read_message_list, read_tools
from finetune.data.reading.readers import read_file
from finetune.data.reading.records import FaultCollector, Record, RecordError, describe_type
from finetune.errors import UserError

NUM_RECORDS_LOOKED_AT = 8
_PROMPT_NAMES = ("src", "instruction", "query", "messages", "conversations", "prompt")
_TEXT_NAMES = ("text", "tgt", "response")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files are read.

    Attributes:
        dataset_format: A key of `FORMATS`; None recognises it.
        preference: "chosen" reads the chosen answer of preference pairs; None refuses such files.
    """

    dataset_format: str | None = None
    preference: str | None = None


DEFAULT_OPTIONS = ReadOptions()


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
        for conversation in convert(read_file(Path(path), faults), faults, options)
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
    name = options.dataset_format
    while name is None and (first := next(stream, None)) is not None:
        looked_at = [first]
        name = recognise([first.fields])
        if name in (None, "text"):  # a later record may show that the first merely lacks its prompt
            looked_at += islice(stream, NUM_RECORDS_LOOKED_AT - 1)
            name = recognise([record.fields for record in looked_at])
        yield from _convert_all(looked_at, name, faults, options)
    yield from _convert_all(stream, name, faults, options)


def recognise(rows: list[dict[str, Any]]) -> str | None:
    """The format of some records by the names of their fields; None when it is none of ours."""
    names = {name for row in rows for name in row}
    for format_name, needed in _SIGNS:
        if needed <= names:
            return format_name
    return "text" if names & set(_TEXT_NAMES) else None


def to_conversation(record: Record, format_name: str | None = "src_tgt") -> Conversation:
    """Reads one record.

    Raises:
        RecordError: A field is missing or of the wrong type, or the messages are in no usable order.
    """
    if format_name is None:
        raise RecordError(
            record,
            f"no known format (fields present: {_present(record)}; the formats need {_describe_formats()}; "
            "see docs/data.md)",
        )
    return FORMATS[format_name](record)


def _convert_all(
    records: Iterable[Record], name: str | None, faults: FaultCollector, options: ReadOptions
) -> Iterator[Conversation]:
    for record in records:
        if name == "preference" and options.preference != "chosen":
            raise UserError(
                f"{record.file}:{record.line_number}: these are preference pairs (chosen and rejected): "
                "set preference to chosen to train on the chosen answers"
            )
        try:
            yield to_conversation(record, name)
        except RecordError as error:
            faults.add(error.faults[0])


# --- the formats ---


def _read_src_tgt(record: Record) -> Conversation:
    """``src``/``tgt``, both strings or both lists of strings; ``system`` at the top or in ``context``."""
    prompts, responses = _read_texts(record, "src"), _read_texts(record, "tgt")
    if len(prompts) != len(responses):
        raise RecordError(
            record,
            f"src has {len(prompts)} entries and tgt has {len(responses)}; each round needs one of both",
        )
    context = record.fields.get("context")
    nested = context.get("system") if isinstance(context, dict) else None
    system = _optional(record, "system") if "system" in record.fields else nested
    if system is not None and not isinstance(system, str):
        raise RecordError(record, f"system is {describe_type(system)}, expected a string")
    conversation = _of_turns(record, zip(prompts, responses, strict=True), system)
    return replace(conversation, is_pair=isinstance(record.fields["src"], str))


def _read_alpaca(record: Record) -> Conversation:
    needed = "instruction, output"
    prompt = _alpaca_prompt(record, needed)
    answer = _string(record, "output", needed)
    return _of_turns(record, [*_history(record), (prompt, answer)], _optional(record, "system"))


def _alpaca_prompt(record: Record, needed: str) -> str:
    instruction, context = _string(record, "instruction", needed), _optional(record, "input")
    return f"{instruction}\n{context}" if instruction and context else instruction or context or ""


def _read_query_response(record: Record) -> Conversation:
    needed = "query, response"
    turn = (_string(record, "query", needed), _string(record, "response", needed))
    return _of_turns(record, [*_history(record), turn], _optional(record, "system"))


def _read_messages(record: Record) -> Conversation:
    return _of_messages(record, "messages")


def _read_sharegpt(record: Record) -> Conversation:
    return _of_messages(record, "conversations")


def _read_text(record: Record) -> Conversation:
    prompt = next((name for name in _PROMPT_NAMES if record.fields.get(name)), None)
    if prompt is not None:
        raise RecordError(
            record,
            f"field {prompt!r} is a prompt, but the first lines of the file have none and were read as text; "
            "set dataset_format, or put the two kinds in different files",
        )
    present = [name for name in _TEXT_NAMES if name in record.fields]
    text = _string(record, present[0] if present else "text", " or ".join(_TEXT_NAMES))
    return Conversation((Message(TEXT, text),), None, record.file, record.line_number)


def _read_preference(record: Record) -> Conversation:
    """The chosen answer behind whatever prompt the record has, in any of the other shapes."""
    fields = record.fields
    chosen = _field(record, "chosen", "chosen, rejected")
    if isinstance(chosen, list):
        answers = [read_message(record, item, f"chosen[{i}]") for i, item in enumerate(chosen)]
    elif isinstance(chosen, dict):
        answers = [read_message(record, chosen, "chosen")]
    else:
        answers = [Message(ASSISTANT, _string(record, "chosen", "chosen, rejected"))]
    for name in ("conversations", "messages"):
        if name in fields:
            return _of_messages(record, name, answers)
    if isinstance(chosen, list) and answers and answers[0].role != ASSISTANT:
        return _of_messages(replace_fields(record, messages=[]), "messages", answers)
    if "instruction" in fields:
        prompt = _alpaca_prompt(record, "instruction")
    else:
        name = next((name for name in ("prompt", "query", "src") if name in fields), "prompt")
        prompt = _string(record, name, "prompt, chosen, rejected")
    history = [
        Message(role, text)
        for turn in _history(record)
        for role, text in zip((USER, ASSISTANT), turn, strict=True)
    ]
    system = _optional(record, "system")
    return _of_messages(
        replace_fields(record, messages=[], system=system),
        "messages",
        [*history, Message(USER, prompt), *answers],
    )


FORMATS: dict[str, Callable[[Record], Conversation]] = {
    "src_tgt": _read_src_tgt,
    "alpaca": _read_alpaca,
    "query_response": _read_query_response,
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "text": _read_text,
    "preference": _read_preference,
}
# Fields that show a format, the first match counts; text is what has no prompt at all.
_SIGNS: tuple[tuple[str, frozenset[str]], ...] = (
    ("preference", frozenset({"chosen", "rejected"})),
    ("messages", frozenset({"messages"})),
    ("sharegpt", frozenset({"conversations"})),
    ("src_tgt", frozenset({"src"})),
    ("alpaca", frozenset({"instruction"})),
    ("query_response", frozenset({"query"})),
)


def _describe_formats() -> str:
    return "src+tgt, instruction+output, query+response, messages, conversations, text, or chosen+rejected"


# --- parts of records ---


def _of_turns(record: Record, turns: Iterable[tuple[str, str]], system: str | None) -> Conversation:
    return make_conversation(turns, system, record.file, record.line_number)


def _of_messages(record: Record, name: str, answers: Iterable[Message] = ()) -> Conversation:
    messages = _field(record, name, name)
    if not isinstance(messages, list):
        raise RecordError(record, f"{name} is {describe_type(messages)}, expected a list of messages")
    read = [read_message(record, item, f"{name}[{i}]") for i, item in enumerate(messages)]
    system, ordered = read_message_list(record, [*read, *answers], name)
    if system is None:
        system = _optional(record, "system")
    return Conversation(ordered, system, record.file, record.line_number, read_tools(record))


def replace_fields(record: Record, **fields: Any) -> Record:
    """The record with some fields set anew."""
    return replace(record, fields={**record.fields, **fields})


def _present(record: Record) -> str:
    return ", ".join(map(repr, record.fields)) or "none"


def _field(record: Record, name: str, needed: str) -> Any:
    if name not in record.fields:
        raise RecordError(
            record, f"field {name!r} is missing (fields present: {_present(record)}; needed: {needed})"
        )
    return record.fields[name]


def _string(record: Record, name: str, needed: str) -> str:
    value = _field(record, name, needed)
    if not isinstance(value, str):
        raise RecordError(record, f"{name} is {describe_type(value)}, expected a string")
    return value


def _optional(record: Record, name: str) -> str | None:
    value = record.fields.get(name)
    if value is not None and not isinstance(value, str):
        raise RecordError(record, f"{name} is {describe_type(value)}, expected a string")
    return value


def _read_texts(record: Record, name: str) -> list[str]:
    value = _field(record, name, "src, tgt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise RecordError(record, f"{name} is {describe_type(value)}, expected a string or a list of strings")
    if not value:
        raise RecordError(record, f"{name} is an empty list, expected at least one round")
    for position, item in enumerate(value):
        if not isinstance(item, str):
            raise RecordError(record, f"{name}[{position}] is {describe_type(item)}, expected a string")
    return value


def _history(record: Record) -> list[tuple[str, str]]:
    """Earlier rounds as pairs of strings; null and "" (an empty CSV field) mean none."""
    history = record.fields.get("history") or []
    if not isinstance(history, list):
        raise RecordError(
            record, f"history is {describe_type(history)}, expected a list of pairs (CSV cannot hold one)"
        )
    for position, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RecordError(record, f"history[{position}] is no pair of strings (a prompt and its answer)")
    return [(prompt, answer) for prompt, answer in history]
