"""Values of fields as text: what may stand where a text is expected, and what a missing one means."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from finetune.data.reading.notes import HISTORY_GAP, HISTORY_TEXT, NUMBER_AS_TEXT, ReadingNotes
from finetune.data.reading.records import Record, RecordError, describe_type

# A round that is an object has one name out of each.
ROUND_PROMPTS = ("user", "human", "prompt", "query", "question", "instruction", "input", "src")
ROUND_ANSWERS = ("assistant", "bot", "gpt", "response", "answer", "output", "completion", "target", "tgt")
_MAX_LITERAL_CHARACTERS = 1_000_000


def is_null(value: Any) -> bool:
    """Whether there is no value: null, or the NaN that tables write for an empty cell."""
    return value is None or (isinstance(value, float) and value != value)


def read_text(record: Record, value: Any, name: str, notes: ReadingNotes) -> str:
    """A text; numbers and booleans become the text that JSON has for them.

    Raises:
        RecordError: It is null, a list or an object.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float) and not is_null(value):
        notes.add(NUMBER_AS_TEXT)
        return json.dumps(value)
    kind = "null" if is_null(value) else describe_type(value)
    raise RecordError(record, f"{name} is {kind}, expected a string")


def read_optional(record: Record, name: str, notes: ReadingNotes) -> str | None:
    """A text that may be missing or null."""
    value = record.fields.get(name)
    return (
        value if isinstance(value, str) else None if is_null(value) else read_text(record, value, name, notes)
    )


def read_history(record: Record, notes: ReadingNotes) -> list[tuple[str, str]]:
    """Earlier rounds as pairs of texts; null and "" (an empty CSV field) mean none.

    A history is a list of pairs, of objects with a prompt and an answer, or of texts by turns; or all of
    that as text (JSON, or as Python writes it). A round that lacks one half is left out and counted.

    Raises:
        RecordError: It is something else.
    """
    history = record.fields.get("history")
    if is_null(history) or history == "":
        return []
    if isinstance(history, str):
        history = _parse_literal(record, history)
        notes.add(HISTORY_TEXT)
    if not isinstance(history, list):
        raise RecordError(record, f"history is {describe_type(history)}, expected a list of pairs")
    if history and len(history) % 2 == 0 and all(isinstance(item, str) for item in history):
        history = [list(pair) for pair in zip(history[0::2], history[1::2], strict=True)]
    rounds = []
    for position, item in enumerate(history):
        prompt, answer = _read_halves(record, item, f"history[{position}]")
        if is_null(prompt) or is_null(answer):
            notes.add(HISTORY_GAP)
            continue
        rounds.append(
            (
                read_text(record, prompt, f"history[{position}][0]", notes),
                read_text(record, answer, f"history[{position}][1]", notes),
            )
        )
    return rounds


def find_halves(item: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The names that an object has for a prompt and for the answer to it."""
    prompt = next((name for name in ROUND_PROMPTS if name in item), None)
    return prompt, next((name for name in ROUND_ANSWERS if name in item), None)


def _read_halves(record: Record, item: Any, name: str) -> tuple[Any, Any]:
    if isinstance(item, list | tuple) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, dict):
        prompt, answer = find_halves(item)
        if prompt and answer:
            return item[prompt], item[answer]
    raise RecordError(
        record,
        f"{name} is no pair of strings (a prompt and its answer): write "
        '[["first prompt", "first answer"], ["second prompt", "second answer"]]',
    )


def _parse_literal(record: Record, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        if len(text) <= _MAX_LITERAL_CHARACTERS:
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    raise RecordError(
        record, 'history is a text that is no list: write it as JSON, such as [["prompt", "answer"]]'
    )
