"""Examples of preference methods: pairs of a chosen and a rejected answer, and single answers marked good or bad.

Every shape that supervised training reads is read here with its second answer or its mark:

- ``chosen`` and ``rejected`` as texts, as a message, as lists of messages (answers alone, or whole conversations
  whose common beginning is the prompt), or as the texts of Anthropic's HH, with Human and Assistant in them;
- ``rejected_response`` or ``rejected_messages`` beside a prompt and its answer, or beside messages (ms-swift);
- ``response`` and ``sort``, several answers with their ranks (PaddleNLP); a list of answers, the best first;
- ``label`` or ``kto_tag`` beside one answer, and one response with one sort.

Of a list of ranked answers the best makes a pair with each that is ranked below it, and of several rejected answers each
makes one. Pairs without a preference (equal
answers, or equal ranks) are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from finetune.data.reading.conversation import ASSISTANT, TOOL_CALL, Comparison, Conversation, Message
from finetune.data.reading.marks import QUALITY_MARKS, REJECTED_FIELDS, decide_mark
from finetune.data.reading.message_lists import order_messages, read_message, read_messages
from finetune.data.reading.notes import EQUAL_ANSWERS, EQUAL_RANKS, PAIR_DIVIDED, RANKED_LIST, ReadingNotes
from finetune.data.reading.pairs import ANSWER_FIELDS
from finetune.data.reading.preferences import read_ranked, use_usual_names
from finetune.data.reading.records import Record, RecordError, describe_type
from finetune.data.reading.values import is_null, read_text

PAIRS, MARKED = "pairs", "marked"
"""What a method compares: two answers, or one with its mark."""

_MAX_MARGIN = 1e6
_ANSWERS = (ASSISTANT, TOOL_CALL)

_ReadOne = Callable[[Record, ReadingNotes], Conversation]
_REJECTED_NAMES = ("rejected", *sorted(REJECTED_FIELDS - {"rejected"}))


def read_comparisons(
    record: Record, kind: str, notes: ReadingNotes, read_one: _ReadOne
) -> Iterator[Conversation]:
    """The examples of a record, each with what it is compared with.

    Args:
        record: The record.
        kind: `PAIRS` or `MARKED`; of a pair, marked answers take the chosen one as good, the rejected one as bad.
        notes: What is read by a rule is counted here.
        read_one: Reads the record as supervised training does: its prompt and its chosen or only answer.

    Raises:
        RecordError: There is nothing to compare, or the answers do not follow the same prompt.
    """
    record = use_usual_names(record)
    margin = _read_margin(record)
    record = record.with_fields({name: value for name, value in record.fields.items() if name != "margin"})
    _refuse_begun_answer(record)
    if (answers := _find_ranked(record)) is not None:
        if len(answers) == 1:
            yield from _of_single(record, kind, answers[0], notes, read_one)
            return
        pairs = _read_ranked_pairs(record, answers, notes, read_one)
    elif name := next((name for name in _REJECTED_NAMES if not is_null(record.fields.get(name))), None):
        pairs = _read_pair(record, name, notes, read_one)
    else:
        yield from _of_mark(record, kind, notes, read_one)
        return
    for chosen, rejected in pairs:
        if rejected.content == chosen.messages[-1].content and rejected.role == chosen.messages[-1].role:
            notes.add(EQUAL_ANSWERS)
        elif kind == PAIRS:
            yield replace(chosen, comparison=Comparison(rejected=rejected, margin=margin))
        else:
            notes.add(PAIR_DIVIDED)
            yield replace(chosen, comparison=Comparison(desirable=True))
            other = (*chosen.messages[:-1], rejected)
            yield replace(chosen, messages=other, comparison=Comparison(desirable=False))


def _refuse_begun_answer(record: Record) -> None:
    """A prompt whose last message is the beginning of the answer, which the answers beside it go on with."""
    fields = record.fields
    answer = next((fields[name] for name in ("chosen", "completion") if not is_null(fields.get(name))), None)
    name = next(
        (name for name in ("prompt", "messages", "conversations") if _is_list_of(fields.get(name), dict)),
        None,
    )
    if answer is None or name is None:
        return
    roles = [each.role for each in read_messages(record, fields[name], name, ReadingNotes())]
    is_whole = _is_list_of(answer, dict) and (
        read_messages(record, answer, "chosen", ReadingNotes())[0].role not in _ANSWERS
    )
    if roles[-1] in _ANSWERS and not is_whole:
        raise RecordError(
            record,
            f"{name} ends with a message of the assistant, which the answers would go on with: write it at the "
            "beginning of each answer instead",
        )


# --- two answers ---


def _read_pair(
    record: Record, name: str, notes: ReadingNotes, read_one: _ReadOne
) -> Iterator[tuple[Conversation, Message]]:
    """A record with a field for its rejected answer."""
    for other in _REJECTED_NAMES:
        if other != name and not is_null(record.fields.get(other)):
            notes.unused_fields[other] += 1
    chosen = _require_prompt(record, read_one(record, notes))
    value = record.fields[name]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        if len(value) > 1:
            notes.add(RANKED_LIST)
        for item in value:
            yield chosen, Message(ASSISTANT, item)
        return
    yield chosen, _read_rejected(record, name, chosen, notes)


def _read_rejected(record: Record, name: str, chosen: Conversation, notes: ReadingNotes) -> Message:
    """The rejected answer: a text, a message, a list of messages, or a whole conversation."""
    value = record.fields[name]
    if isinstance(value, list):
        messages = read_messages(record, value, name, notes)
    elif isinstance(value, dict):
        messages = [read_message(record, value, name, notes)]
    else:
        messages = [Message(ASSISTANT, read_text(record, value, name, notes))]
    if not messages:
        raise RecordError(record, f"{name} is an empty list, expected an answer")
    if messages[0].role in _ANSWERS:
        system, ordered = order_messages(record, [*chosen.messages[:-1], *messages], name, notes)
    else:
        system, ordered = order_messages(record, messages, name, notes)
        if system is not None and system != chosen.system:
            raise RecordError(record, f"{name} has another system text than the chosen answer")
    _check_prompt(record, name, chosen, ordered)
    return ordered[-1]


def _check_prompt(record: Record, name: str, chosen: Conversation, ordered: tuple[Message, ...]) -> None:
    """Both answers must be the last message behind the same ones."""
    first, second = ([(each.role, each.content) for each in part] for part in (chosen.messages, ordered))
    if len(first) == len(second) and first[:-1] == second[:-1]:
        return
    num_equal = next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
    raise RecordError(
        record,
        f"the chosen answer and {name} do not follow the same prompt: of {len(first)} and {len(second)} messages "
        f"the first {num_equal} are equal, and only the last may differ: end both conversations with the first "
        "answer in which they differ",
    )


# --- several answers with their ranks ---


def _find_ranked(record: Record) -> list[tuple[Any, Record]] | None:
    """Rank and record of each answer, where a record has a list of them; None where it has none."""
    fields = record.fields
    if "sort" in fields and "response" in fields:
        return read_ranked(record)
    if not fields.keys().isdisjoint(REJECTED_FIELDS | {"chosen"}):
        return None
    name = next((name for name in ANSWER_FIELDS if _is_list_of_texts(fields.get(name))), None)
    if name is None:
        return None
    return [
        (-place, record.with_fields({**fields, name: answer})) for place, answer in enumerate(fields[name])
    ]


def _is_list_of_texts(value: Any) -> bool:
    return _is_list_of(value, str) and len(value) > 1


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _read_ranked_pairs(
    record: Record, answers: list[tuple[Any, Record]], notes: ReadingNotes, read_one: _ReadOne
) -> Iterator[tuple[Conversation, Message]]:
    best = max(range(len(answers)), key=lambda place: (answers[place][0], -place))
    rank, first = answers[best]
    lower = [other for other_rank, other in answers if other_rank < rank]
    if not lower:
        notes.add(EQUAL_RANKS)
        return
    if len(answers) > 2:
        notes.add(RANKED_LIST)
    chosen = _require_prompt(record, read_one(first, notes))
    for other in lower:
        yield chosen, read_one(other, notes).messages[-1]


# --- one answer ---


def _of_single(
    record: Record, kind: str, answer: tuple[Any, Record], notes: ReadingNotes, read_one: _ReadOne
) -> Iterator[Conversation]:
    rank, single = answer
    desirable = decide_mark(rank)
    if desirable is None:
        raise RecordError(record, f"sort of a single response is {rank}, expected 1 (good) or 0 (bad)")
    yield _mark(record, kind, desirable, read_one(single, notes))


def _of_mark(record: Record, kind: str, notes: ReadingNotes, read_one: _ReadOne) -> Iterator[Conversation]:
    decided = {
        mark: decide_mark(record.fields[mark])
        for mark in sorted(QUALITY_MARKS)
        if not is_null(record.fields.get(mark)) and record.fields[mark] != ""
    }
    for mark, value in decided.items():
        if value is None:
            raise RecordError(
                record, f"{mark} is {str(record.fields[mark])[:40]}, expected true for a good answer or false"
            )
    if not decided:
        present = ", ".join(map(repr, record.fields)) or "none"
        needed = "chosen and rejected" if kind == PAIRS else "label, or chosen and rejected"
        raise RecordError(
            record, f"nothing to compare an answer with (fields present: {present}; needed: {needed})"
        )
    if len(set(decided.values())) > 1:
        raise RecordError(record, f"{' and '.join(decided)} contradict each other")
    kept = {name: value for name, value in record.fields.items() if name not in QUALITY_MARKS}
    conversation = read_one(record.with_fields(kept), notes)
    yield _mark(record, kind, bool(next(iter(decided.values()))), conversation)


def _mark(record: Record, kind: str, desirable: bool, conversation: Conversation) -> Conversation:
    if kind == PAIRS:
        raise RecordError(
            record,
            "one answer that is marked as good or bad is data of KTO (loss_type kto); this method compares two "
            "answers to the same prompt, chosen and rejected",
        )
    return replace(_require_prompt(record, conversation), comparison=Comparison(desirable=desirable))


def _require_prompt(record: Record, conversation: Conversation) -> Conversation:
    if conversation.is_text:
        raise RecordError(record, "there is no prompt, and answers are compared behind a prompt")
    return conversation


def _read_margin(record: Record) -> float:
    """By how much the chosen answer is better; 0.0 where nothing is said."""
    margin = record.fields.get("margin")
    if is_null(margin) or margin == "":
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise RecordError(record, f"margin is {describe_type(margin)}, expected a number")
    if abs(margin) > _MAX_MARGIN:
        raise RecordError(record, f"margin is {margin:g}, expected a number of at most {_MAX_MARGIN:g}")
    return float(margin)
