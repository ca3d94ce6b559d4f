"""Why examples give no sample, and what to do about each reason where none is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from finetune.data.reading.no_examples import describe_no_example
from finetune.data.reading.records import FaultCollector

EMPTY_RESPONSE = "empty response"
EMPTY_TEXT = "empty text"
NO_ROOM = "no label token left within the length"
EMPTY_PROMPT = "empty prompt"
TOO_LONG = "too long"
NOT_LEARNED = "all answers marked as not to be learned"
REFUSED = "refused by the chat template"

_REMEDIES = {
    EMPTY_RESPONSE: "Fill in the answers (the tgt fields, or what the format calls them).",
    EMPTY_TEXT: "Fill in the texts.",
    NO_ROOM: "Leave more room: a larger max_length or a smaller src_length.",
    EMPTY_PROMPT: "Fill in the prompts, or evaluate by loss: eval_with_do_generation false.",
    TOO_LONG: "Raise max_length (or src_length for prompts), or set truncation to left or right, which cut.",
    NOT_LEARNED: "Take the marks (loss, weight, train or the like, false or 0) off the answers that are to be learned; "
    "train_on last looks at the last ones alone.",
    REFUSED: "Give chat_template another name or file.",
}


def describe_reasons(counts: Counter[str]) -> str:
    """Reasons with their counts."""
    return ", ".join(f"{count:,} ({reason})" for reason, count in sorted(counts.items()) if count)


def describe_remedies(counts: Counter[str]) -> str:
    """What to do about these reasons, the most frequent first."""
    return " ".join(_REMEDIES[reason] for reason, count in counts.most_common() if count)


def describe_nothing(
    files: Sequence[str], num_lines: int, dropped: Counter[str], refused: FaultCollector, lengths: str
) -> str:
    """Why no example of some files can be used, and what to do.

    Args:
        files: Where they come from.
        num_lines: How many there are.
        dropped: How many gave no sample, by reason.
        refused: Those that the template refused.
        lengths: The limits of length, as the settings name them.
    """
    named = ", ".join(files) or "the data set"
    if not num_lines:
        return describe_no_example(named, FaultCollector())
    counts = dropped + Counter({REFUSED: refused.num_faults})
    first = f" The first that was refused: {refused.messages[0]}" if refused.messages else ""
    return (
        f"{named}: none of the {num_lines:,} examples can be used with {lengths} "
        f"(dropped: {describe_reasons(counts)}). {describe_remedies(counts)}{first}"
    )
