"""Marks on examples and on answers: what is not to be learned, and what is a bad answer.

ms-swift writes ``loss`` and OpenAI ``weight`` beside a message, Axolotl ``train``; data of preference methods
have ``label`` or ``kto_tag`` beside the example, which is false for an answer that a model shall avoid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.data.reading.notes import BAD_ANSWER, EXAMPLE_UNLEARNED, ReadingNotes
from finetune.data.reading.records import Record, RecordError
from finetune.data.reading.values import is_null

LEARNED_MARKS = frozenset(
    {"loss", "loss_mask", "loss_weight", "weight", "train", "trainable", "training", "is_train"}
)
QUALITY_MARKS = frozenset({"label", "kto_tag"})
MARKS = LEARNED_MARKS | QUALITY_MARKS
# What beside an answer only data of a preference method have.
REJECTED_FIELDS = frozenset(
    {"rejected", "rejected_response", "rejected_messages", "rejected_answer", "non_preferred_output"}
)
_WORDS = {
    "true": True,
    "1": True,
    "1.0": True,
    "yes": True,
    "false": False,
    "0": False,
    "0.0": False,
    "no": False,
}


def read_learned(record: Record, holder: Mapping[str, Any], name: str) -> bool | None:
    """Whether an object is marked to be learned; None without a mark.

    Args:
        record: Where it stands, for messages.
        holder: The record's fields, or a message.
        name: What to call the object: "" or "messages[3].".

    Raises:
        RecordError: A mark that is neither 0 nor 1, or marks that contradict each other.
    """
    found: dict[str, bool] = {}
    for mark in holder.keys() & LEARNED_MARKS:
        value = holder[mark]
        if is_null(value) or value == "":
            continue
        decided = decide_mark(value)
        if decided is None:
            raise RecordError(
                record,
                f"{name}{mark} is {str(value)[:40]}: a mark on answers is true or false (or 1 or 0); "
                "an answer cannot be learned in part, and a field of another meaning needs another name",
            )
        found[mark] = decided
    if len(set(found.values())) > 1:
        raise RecordError(record, f"{name}{' and '.join(sorted(found))} contradict each other")
    return next(iter(found.values()), None)


def is_left_out(record: Record, preference: str | None, notes: ReadingNotes) -> bool:
    """Whether the marks of an example leave it out.

    Raises:
        RecordError: It is marked as a bad answer, and nobody said what to do with those.
    """
    fields = record.fields
    if not fields.keys() & MARKS:
        return False
    if read_learned(record, fields, "") is False:
        notes.add(EXAMPLE_UNLEARNED)
        return True
    for mark in fields.keys() & QUALITY_MARKS:
        decided = decide_mark(fields[mark])
        if decided is None and not is_null(fields[mark]) and fields[mark] != "":
            notes.unused_fields[mark] += 1  # a class, for example: of another meaning than a mark
        if decided is False:
            notes.add(BAD_ANSWER)
            if preference == "chosen":
                return True
            raise RecordError(record, f"{mark} is false: this is an answer to be avoided, not to be learned")
    return False


def describe_bad_answers(notes: ReadingNotes) -> str | None:
    """The line that counts examples marked as bad answers and says what to do; None when there are none."""
    count = notes.rules[BAD_ANSWER]
    if not count:
        return None
    examples = "1 example is" if count == 1 else f"{count:,} examples are"
    return (
        f"{examples} marked as bad answers (label or kto_tag is false): these are data of a preference method "
        "(KTO), which supervised training would learn as good ones. Set loss_type to kto to train on both kinds "
        "(as in llama/kto_argument.json), or preference to chosen to train on the others."
    )


def decide_mark(value: Any) -> bool | None:
    """True or false for a mark in any usual spelling; None for what is no mark."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return _WORDS.get(value.strip().lower()) if isinstance(value, str) else None
