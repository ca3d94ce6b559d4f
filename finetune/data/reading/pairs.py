"""Records with a prompt and an answer in fields of their own, under any of the names that people use."""

from __future__ import annotations

import functools
from typing import Any

from finetune.data.reading.conversation import ASSISTANT, TEXT, USER, Conversation, Message
from finetune.data.reading.marks import MARKS
from finetune.data.reading.message_lists import mark_empty_answers, order_messages, read_messages, read_tools
from finetune.data.reading.notes import EMPTY_PROMPT, ReadingNotes
from finetune.data.reading.records import Record, RecordError
from finetune.data.reading.values import is_null, read_history, read_optional, read_text

# What stands in several of these is one prompt, in this order with line breaks between.
PROMPT_FIELDS = ("instruction", "prompt", "question", "query", "input")
ANSWER_FIELDS = ("output", "response", "completion", "answer", "target", "summary")
# Names that are prompts only beside these answers, because they mean other things elsewhere.
_PROMPTS_OF_ANSWERS = {"summary": ("content", "document", "article", "text"), "target": ("source",)}
# LLaMA-Factory's and Alpaca's two halves of a prompt, and Dolly's; other combinations are told.
_USUAL_PROMPTS = (("instruction", "input"), ("prompt", "query"), ("instruction", "context"))
SYSTEM_FIELDS = ("system", "system_prompt")
_USED = frozenset({*PROMPT_FIELDS, "history", "tools", *SYSTEM_FIELDS}) | MARKS


def has_pair(names: set[str]) -> bool:
    """Whether fields of these names hold a prompt and its answer."""
    if names.isdisjoint(ANSWER_FIELDS):
        return False
    if not names.isdisjoint(PROMPT_FIELDS):
        return True
    return any(
        answer in names and not names.isdisjoint(prompts) for answer, prompts in _PROMPTS_OF_ANSWERS.items()
    )


def read_pair(record: Record, notes: ReadingNotes, needed: tuple[str, str]) -> Conversation:
    """Reads a prompt, its answer, and the history in front of them.

    Args:
        record: The record.
        notes: What is read by a rule is counted here.
        needed: The names of prompt and answer, in a message about one that is missing.

    Raises:
        RecordError: There is no prompt or no answer, or one that is no text.
    """
    if (plain := _read_plain(record)) is not None:
        return plain
    answer_name = _find_answer(record, needed)
    prompt_names = find_prompt_names(record)
    if not prompt_names:
        others = _PROMPTS_OF_ANSWERS.get(answer_name or "", ())
        prompt_names = [name for name in others if name in record.fields][:1]
    missing = needed[0] if not prompt_names else needed[1]
    if not prompt_names or answer_name is None:
        raise RecordError(record, describe_missing(record, missing, needed))
    note_unused(record, _USED | {answer_name, *prompt_names}, notes)
    if len(prompt_names) > 1 and tuple(prompt_names) not in _USUAL_PROMPTS:
        notes.add(f"prompts made of {' and '.join(prompt_names)}")
    answer = record.fields[answer_name]
    lists = [record.fields[name] for name in prompt_names if isinstance(record.fields[name], list)]
    if lists:
        return _read_message_pair(record, lists[0], answer, prompt_names[0], notes)
    system = read_system(record, notes)
    rounds = read_history(record, notes)
    response = read_text(record, answer, answer_name, notes)
    prompt = join_prompt(record, prompt_names, notes)
    messages = make_messages([*rounds, (prompt, response)])
    return Conversation(
        mark_empty_answers(messages, notes), system, record.file, record.line_number, read_tools(record)
    )


def _read_plain(record: Record) -> Conversation | None:
    """The fast way for a prompt and an answer that are texts, with nothing beside them; None for all else."""
    fields = record.fields
    names = _find_plain_names(tuple(fields))
    if names is None or fields.get("history") or fields.get("system") is not None:
        return None
    prompt_name, input_name, answer_name = names
    prompt, answer = fields[prompt_name], fields[answer_name]
    if type(answer) is not str or type(prompt) is not str:
        return None
    if input_name is not None:
        second = fields[input_name]
        if type(second) is not str:
            return None
        prompt = f"{prompt}\n{second}" if prompt and second else prompt or second
    if not prompt:
        return None
    messages = Message(USER, prompt), Message(ASSISTANT, answer)
    return Conversation(messages, None, record.file, record.line_number)


@functools.lru_cache(maxsize=256)
def _find_plain_names(names: tuple[str, ...]) -> tuple[str, str | None, str] | None:
    """The names of a prompt, of its second half, and of the answer, where a record has nothing else of weight."""
    prompts = tuple(name for name in PROMPT_FIELDS if name in names)
    answers = [name for name in ANSWER_FIELDS if name in names]
    is_usual = len(prompts) == 1 or prompts in _USUAL_PROMPTS
    if not is_usual or len(answers) != 1 or set(names) - {*prompts, *answers, "history", "system"}:
        return None
    return prompts[0], prompts[1] if len(prompts) > 1 else None, answers[0]


def make_messages(rounds: list[tuple[str, str]]) -> list[Message]:
    """Messages of pairs of a prompt and its answer."""
    return [
        Message(role, text) for pair in rounds for role, text in zip((USER, ASSISTANT), pair, strict=True)
    ]


def join_prompt(record: Record, names: list[str], notes: ReadingNotes) -> str:
    """The texts of several fields with line breaks between; what is empty or null is left out."""
    parts = [
        read_text(record, record.fields[name], name, notes)
        for name in names
        if not is_null(record.fields[name])
    ]
    return "\n".join(filter(None, parts))


def read_system(record: Record, notes: ReadingNotes, among_messages: str | None = None) -> str | None:
    """The system text of a record; None when it has none.

    Args:
        record: The record.
        notes: A field that has another text than the one that counts is noted here as not used.
        among_messages: The one that stands among its messages, which counts before any field.
    """
    found = among_messages
    for name in SYSTEM_FIELDS:
        system = read_optional(record, name, notes)
        if found is None:
            found = system
        elif system and system != found:
            notes.unused_fields[name] += 1
    return found


def take_empty_prompt(conversation: Conversation, notes: ReadingNotes) -> Conversation:
    """An answer to an empty prompt, with nothing else before it, is running text, in every format."""
    first, *rest = conversation.messages
    if first.content or first.role != USER or len(rest) != 1 or rest[0].role != ASSISTANT:
        return conversation
    if conversation.system or conversation.tools:
        return conversation
    notes.add(EMPTY_PROMPT)
    text = Message(TEXT, rest[0].content, rest[0].learned)
    return Conversation((text,), None, conversation.file, conversation.line_number)


def note_unused(record: Record, used: frozenset[str] | set[str], notes: ReadingNotes) -> None:
    """Counts the fields that have a value and are not used."""
    for name in record.fields.keys() - used:
        value = record.fields[name]
        if not is_null(value) and value != "" and value != []:
            notes.unused_fields[name] += 1


def find_prompt_names(record: Record) -> list[str]:
    """The fields of a record that make its prompt, in order."""
    names = [name for name in PROMPT_FIELDS if name in record.fields]
    # Dolly's name for what Alpaca calls input; elsewhere an object of other things.
    if "input" not in names and names and isinstance(record.fields.get("context"), str):
        names.append("context")
    return names


def _find_answer(record: Record, needed: tuple[str, str]) -> str | None:
    names = (needed[1], *ANSWER_FIELDS)
    found = next((name for name in names if not is_null(record.fields.get(name))), None)
    return found or next((name for name in names if name in record.fields), None)


def describe_missing(record: Record, name: str, needed: tuple[str, ...]) -> str:
    """Says that a field is missing, which there are, and which are needed."""
    present = ", ".join(map(repr, record.fields)) or "none"
    return f"field {name!r} is missing (fields present: {present}; needed: {', '.join(needed)})"


def _read_message_pair(
    record: Record, prompt: list[Any], answer: Any, name: str, notes: ReadingNotes
) -> Conversation:
    """A prompt that is a list of messages, and an answer that is one as well, or a text."""
    answers = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    messages = [*read_messages(record, prompt, name, notes), *read_messages(record, answers, "answer", notes)]
    system, ordered = order_messages(record, messages, name, notes)
    system = read_system(record, notes, system)
    return Conversation(ordered, system, record.file, record.line_number, read_tools(record))
