"""Data of preference methods: what is refused, and what is read where the chosen answers are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from finetune.data.reading.conversation import ASSISTANT, TOOL_CALL, USER, Conversation, Message
from finetune.data.reading.marks import MARKS, REJECTED_FIELDS
from finetune.data.reading.message_lists import order_messages, read_message, read_messages, read_tools
from finetune.data.reading.notes import ReadingNotes
from finetune.data.reading.pairs import (
    PROMPT_FIELDS,
    describe_missing,
    find_prompt_names,
    join_prompt,
    make_messages,
    note_unused,
    read_system,
)
from finetune.data.reading.records import Record, RecordError, describe_type
from finetune.data.reading.values import is_null, read_history, read_text
from finetune.errors import UserError

_LISTS = ("conversations", "messages")
_ANSWERS = (ASSISTANT, TOOL_CALL)
_USED = (
    frozenset({*PROMPT_FIELDS, *_LISTS, "chosen", "history", "system", "tools", "src"})
    | REJECTED_FIELDS
    | MARKS
)


_PAIRS_OF_NAMES = (("chosen_response", "rejected_response"), ("preferred_output", "non_preferred_output"))
_HH_START = re.compile(r"\s*Human:")
_HH_END = re.compile(r"\n\nAssistant:\s*$")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_preference(names: set[str]) -> bool:
    """Whether fields of these names show a preference: pairs, or answers with their order (PaddleNLP)."""
    return not names.isdisjoint(REJECTED_FIELDS) or {"response", "sort"} <= names


def refuse_preference(record: Record) -> None:
    """Raises for a record that holds a preference.

    Raises:
        UserError: Always, with what to do.
    """
    shown = "chosen and rejected" if "chosen" in record.fields else ""
    shown = shown or ", ".join(sorted(record.fields.keys() & (REJECTED_FIELDS | {"response", "sort"})))
    raise UserError(
        f"{record.file}:{record.line_number}: these are preference pairs ({shown}), the data of a preference method "
        "such as DPO: set loss_type to train on them (as in llama/dpo_argument.json), or preference "
        "to chosen to train on the chosen answers alone"
    )


def read_preference(
    record: Record, notes: ReadingNotes, read_other: Callable[[Record, ReadingNotes], Conversation]
) -> Conversation:
    """The chosen answer behind whatever prompt the record has, in any of the other shapes.

    Args:
        record: The record.
        notes: What is read by a rule is counted here.
        read_other: Reads a record that holds its chosen answer as records of other formats do.

    Raises:
        RecordError: There is no prompt or no chosen answer, or one that is no text.
    """
    record = use_usual_names(record)
    fields = record.fields
    if "sort" in fields and "response" in fields:
        return read_other(max(read_ranked(record), key=lambda answer: answer[0])[1], notes)
    if "chosen" not in fields and not fields.keys().isdisjoint(REJECTED_FIELDS):
        kept = {name: value for name, value in fields.items() if name not in REJECTED_FIELDS}
        return read_other(record.with_fields(kept), notes)
    answers = _read_chosen(record, notes)
    is_whole = isinstance(fields["chosen"], list) and bool(answers) and answers[0].role not in _ANSWERS
    # Whole conversations stand for themselves, whatever is beside them.
    name = None if is_whole else next((name for name in _LISTS if name in fields), None)
    note_unused(record, _USED.difference(_LISTS) if is_whole else _USED, notes)
    system = read_system(record, notes)
    if is_whole:
        before: list[Message] = []
    elif name is not None:
        before = read_messages(record, _as_list(record, name), name, notes)
    else:
        before = _read_prompt(record, notes)
    own, ordered = order_messages(record, [*before, *answers], name or "messages", notes)
    return Conversation(
        ordered, own if own is not None else system, record.file, record.line_number, read_tools(record)
    )


def _read_chosen(record: Record, notes: ReadingNotes) -> list[Message]:
    if "chosen" not in record.fields:
        raise RecordError(record, describe_missing(record, "chosen", ("chosen", "rejected")))
    chosen = record.fields["chosen"]
    if isinstance(chosen, list):
        return read_messages(record, chosen, "chosen", notes)
    if isinstance(chosen, dict):
        return [read_message(record, chosen, "chosen", notes)]
    return [Message(ASSISTANT, read_text(record, chosen, "chosen", notes))]


def _read_prompt(record: Record, notes: ReadingNotes) -> list[Message]:
    names = find_prompt_names(record) or [name for name in ("src",) if name in record.fields]
    if not names:
        raise RecordError(record, describe_missing(record, "prompt", ("prompt", "chosen", "rejected")))
    history = make_messages(read_history(record, notes))
    if isinstance(record.fields[names[0]], list):
        return [*history, *read_messages(record, record.fields[names[0]], names[0], notes)]
    return [*history, Message(USER, join_prompt(record, names, notes))]


def _as_list(record: Record, name: str) -> list[Any]:
    value = record.fields[name]
    if not isinstance(value, list):
        raise RecordError(record, f"{name} is {describe_type(value)}, expected a list of messages")
    return value


def read_ranked(record: Record) -> list[tuple[float, Record]]:
    """PaddleNLP's shape: ``response`` has the answers to the last of ``src``, ``sort`` their ranks, the best highest.

    Returns:
        For each answer its rank and a record with it alone, of the shape ``src``, ``tgt``.

    Raises:
        RecordError: Answers and ranks do not fit together.
    """
    fields = dict(record.fields)
    answers, ranks = fields.pop("response"), fields.pop("sort")
    if isinstance(answers, str) and not isinstance(ranks, list):
        answers, ranks = [answers], [ranks]
    if isinstance(answers, list):  # PaddleNLP's later files have each answer in a list of its own
        answers = [each[0] if isinstance(each, list) and len(each) == 1 else each for each in answers]
    are_lists = isinstance(answers, list) and isinstance(ranks, list)
    if not (are_lists and answers and len(answers) == len(ranks) and all(map(_is_number, ranks))):
        raise RecordError(
            record, "response and sort must be lists of answers and of their ranks, of one length"
        )
    src, tgt = (fields.get(name) for name in ("src", "tgt"))
    prompts = src if isinstance(src, list) else [src]
    earlier = tgt if isinstance(tgt, list) else [] if is_null(tgt) or tgt == "" else [tgt]
    return [
        (rank, record.with_fields({**fields, "src": prompts, "tgt": [*earlier, answer]}))
        for rank, answer in zip(ranks, answers, strict=True)
    ]


def use_usual_names(record: Record) -> Record:
    """The record with ``chosen`` and ``rejected`` where it has other names for them, and with messages for HH's texts.

    OpenAI writes ``preferred_output`` and ``non_preferred_output`` behind ``input``, an object with messages; others
    write ``chosen_response`` and ``rejected_response``, or put an answer into a list by itself. Anthropic's HH has
    conversations as text.
    """
    fields = dict(record.fields)
    for chosen, rejected in _PAIRS_OF_NAMES:
        if chosen in fields and rejected in fields and "chosen" not in fields:
            fields["chosen"], fields["rejected"] = fields.pop(chosen), fields.pop(rejected)
            given = fields.get("input")
            if isinstance(given, dict) and isinstance(given.get("messages"), list):
                del fields["input"]
                fields = {**{key: value for key, value in given.items() if value}, **fields}
    only = fields.get("chosen")
    if isinstance(only, list) and len(only) == 1 and isinstance(only[0], str):
        fields["chosen"] = only[0]
    written = [fields.get(name) for name in ("chosen", "rejected")]
    if all(isinstance(text, str) and _HH_START.match(text) for text in written):
        fields |= {name: _parse_dialogue(fields[name]) for name in ("chosen", "rejected")}
    prompt = fields.get("prompt")
    if isinstance(prompt, str) and _HH_START.match(prompt) and _HH_END.search(prompt):
        fields["prompt"] = _parse_dialogue(_HH_END.sub("", prompt))
    return record if fields == record.fields else record.with_fields(fields)


def _parse_dialogue(text: str) -> list[dict[str, str]]:
    """The messages of a text in which Human and Assistant take turns."""
    parts = _HH_TURN.split("\n\n" + text.strip())[1:]
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
        for speaker, content in zip(parts[0::2], parts[1::2], strict=True)
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not is_null(value)
