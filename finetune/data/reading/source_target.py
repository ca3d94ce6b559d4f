"""PaddleNLP's format: ``src`` and ``tgt``, one round of two texts or several of two lists."""

from __future__ import annotations

from finetune.data.reading.conversation import ASSISTANT, USER, Conversation, Message
from finetune.data.reading.marks import MARKS
from finetune.data.reading.message_lists import mark_empty_answers, read_tools
from finetune.data.reading.notes import ReadingNotes
from finetune.data.reading.pairs import describe_missing, make_messages, note_unused
from finetune.data.reading.records import Record, RecordError, describe_type
from finetune.data.reading.values import is_null, read_text

_USED = frozenset({"src", "tgt", "system", "tools"}) | MARKS


def read_src_tgt(record: Record, notes: ReadingNotes) -> Conversation:
    """``src``/``tgt``, both strings or both lists of strings; ``system`` at the top or in ``context``."""
    fields = record.fields
    if len(fields) == 2 and type(fields.get("src")) is type(fields.get("tgt")) is str:  # nearly all are so
        messages = Message(USER, fields["src"]), Message(ASSISTANT, fields["tgt"])
        return Conversation(messages, None, record.file, record.line_number, is_pair=True)
    prompts, responses = (_read_texts(record, name, notes) for name in ("src", "tgt"))
    if len(prompts) != len(responses):
        raise RecordError(
            record,
            f"src has {len(prompts)} entries and tgt has {len(responses)}; each round needs one of both",
        )
    context = fields.get("context")
    nested = context if isinstance(context, dict) else {}
    given, inside = fields.get("system"), nested.get("system")
    system = inside if is_null(given) else given
    if not is_null(system) and not isinstance(system, str):
        system = read_text(record, system, "system", notes)
    if len(fields) > 2:
        note_unused(record, _USED | ({"context"} if nested else set()), notes)
        is_other = not is_null(given) and inside not in (None, "", given)
        notes.unused_fields.update(f"context.{name}" for name in nested if name != "system" or is_other)
    rounds = make_messages(list(zip(prompts, responses, strict=True)))
    return Conversation(
        mark_empty_answers(rounds, notes),
        system,
        record.file,
        record.line_number,
        read_tools(record),
        is_pair=not isinstance(fields["src"], list),
    )


def _read_texts(record: Record, name: str, notes: ReadingNotes) -> list[str]:
    if name not in record.fields:
        raise RecordError(record, describe_missing(record, name, ("src", "tgt")))
    value = record.fields[name]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        if is_null(value) and name == "src":
            return [""]
        if is_null(value) or isinstance(value, dict):
            what = "null" if is_null(value) else describe_type(value)
            raise RecordError(record, f"{name} is {what}, expected a string or a list of strings")
        return [read_text(record, value, name, notes)]
    if not value:
        raise RecordError(record, f"{name} is an empty list, expected at least one round")
    if name == "src" and len(value) == 1 and is_null(value[0]):
        return [""]
    return [read_text(record, item, f"{name}[{position}]", notes) for position, item in enumerate(value)]
