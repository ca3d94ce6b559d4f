"""From a record to a conversation: whatever the shape of the file, the later stages see rounds of text.

The shape read here is PaddleNLP's: ``src`` and ``tgt``, both strings or both lists of strings (one entry
for each round), and optionally a ``system`` text, at the top or inside ``context``. Other fields are left
alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.source import FaultCollector, Record, RecordError, describe_type, read_records


@dataclass(frozen=True, slots=True)
class Turn:
    """One round: what was asked and what is to be learned."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """The rounds of one example, oldest first.

    Attributes:
        turns: At least one.
        system: Text that stands before the first round, if the example has any.
        file: Where the example was read, for messages.
        line_number: Its line, counted from 1.
    """

    turns: tuple[Turn, ...]
    system: str | None
    file: Path
    line_number: int


def to_conversation(record: Record) -> Conversation:
    """Read a record of the ``src``/``tgt`` shape.

    Raises:
        RecordError: A field is missing or of the wrong type, or the lists are empty or of unequal length.
    """
    prompts = _read_texts(record, "src")
    responses = _read_texts(record, "tgt")
    if len(prompts) != len(responses):
        raise RecordError(
            record,
            f"src has {len(prompts)} entries and tgt has {len(responses)}; each round needs one of both",
        )
    turns = tuple(map(Turn, prompts, responses))
    return Conversation(turns, _read_system(record), record.file, record.line_number)


def read_conversations(paths: Iterable[str | Path]) -> list[Conversation]:
    """Read all examples of some files.

    Raises:
        UserError: The faults of the lines and of their fields together, in file order.
    """
    faults = FaultCollector()
    conversations = []
    for record in read_records(paths, faults):
        try:
            conversations.append(to_conversation(record))
        except RecordError as error:
            faults.add(error.faults[0])
    faults.raise_if_any()
    return conversations


def _read_texts(record: Record, name: str) -> list[str]:
    if name not in record.fields:
        present = ", ".join(map(repr, record.fields)) or "none"
        raise RecordError(record, f"field {name!r} is missing (fields present: {present}; needed: src, tgt)")
    value = record.fields[name]
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


def _read_system(record: Record) -> str | None:
    context: Any = record.fields.get("context")
    nested = context.get("system") if isinstance(context, dict) else None
    system = record.fields.get("system", nested)
    if system is not None and not isinstance(system, str):
        raise RecordError(record, f"system is {describe_type(system)}, expected a string")
    return system
