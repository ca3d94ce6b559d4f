"""Why a data set that has lines gives no example, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from finetune.data.reading.notes import BAD_ANSWER, EXAMPLE_UNLEARNED
from finetune.data.reading.records import FaultCollector

_EXPECTED = (
    ' Expected lines such as {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    ' or {"src": "...", "tgt": "..."}.'
)
_REASONS = {
    EXAMPLE_UNLEARNED: "marked as not to be learned (loss, weight, train or the like is false or 0 beside the example): "
    "take the marks out, or give other data",
    BAD_ANSWER: "marked as bad answers (label or kto_tag is false), and preference chosen leaves these out: give data "
    "with good answers",
}


class Counts(NamedTuple):
    """What had been left out at some time in reading.

    Attributes:
        num_faulty: Lines skipped.
        rules: How often each rule was applied.
    """

    num_faulty: int
    rules: Mapping[str, int]


def count_left_out(faults: FaultCollector) -> Counts:
    """What is left out so far."""
    return Counts(faults.num_faults, Counter(faults.notes.rules))


def describe_no_example(name: str, faults: FaultCollector, before: Counts | None = None) -> str:
    """One fault: a data set without any example, with the counts of what was left out and a remedy.

    Args:
        name: The data set.
        faults: What was left out in reading.
        before: What of it was left out of other data sets.
    """
    before = before or Counts(0, {})
    why = [
        f"{count:,} {'example is' if count == 1 else 'examples are'} {reason}"
        for rule, reason in _REASONS.items()
        if (count := faults.notes.rules[rule] - before.rules.get(rule, 0)) > 0
    ]
    if (count := faults.num_faults - before.num_faulty) > 0:
        first = faults.messages[min(before.num_faulty, len(faults.messages) - 1)]
        lines = "1 line was skipped: " if count == 1 else f"{count:,} lines were skipped, the first: "
        why.append(f"{lines}{first} (on_bad_line error tells more of them)")
    if not why:
        return f"{name}: no example found, the files are empty.{_EXPECTED}"
    return f"{name}: no example found. {'; '.join(why)}."
