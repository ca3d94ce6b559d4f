"""The lines of a file as answers that a reward model is asked about.

Every shape of training data is read: a prompt with its answer is one answer, a chosen and a rejected answer are two, a
ranked list is as many as it has. Each is read behind its prompt, and the last answer of a conversation counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.data.reading.comparisons import MARKED, PAIRS
from finetune.data.reading.conversation import Comparison, Conversation
from finetune.data.reading.formats import NUM_RECORDS_LOOKED_AT, convert, recognise
from finetune.data.reading.marks import QUALITY_MARKS
from finetune.data.reading.preferences import is_preference
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.records import FaultCollector, Record
from finetune.data.reading.values import is_null
from finetune.errors import UserError
from finetune.serving.predict.requests import read_records

REWARD, CHOSEN, REJECTED = "reward", "reward_chosen", "reward_rejected"


@dataclass(frozen=True)
class ScoredRow:
    """One line of the input.

    Attributes:
        fields: The object as it was read.
        answers: Each as the last message of its conversation: of a pair the chosen one first.
        is_pair: Whether the line compares answers.
    """

    fields: dict[str, Any]
    answers: tuple[Conversation, ...]
    is_pair: bool

    def result(self, rewards: Sequence[float]) -> dict[str, Any]:
        """The line of the output: the object with the rewards of its answers."""
        if not self.is_pair:
            return {**self.fields, REWARD: rewards[0]}
        rejected = rewards[1] if len(rewards) == 2 else list(rewards[1:])
        return {**self.fields, CHOSEN: rewards[0], REJECTED: rejected}


def read_rows(path: Path) -> list[ScoredRow]:
    """Reads all lines of a file.

    Raises:
        UserError: It is missing or empty, or lines are faulty; all faults together.
    """
    faults = FaultCollector()
    records = read_records(path, faults)
    name = recognise(records[:NUM_RECORDS_LOOKED_AT])
    rows = [row for record in records if (row := _read_row(record, name, faults)) is not None]
    faults.raise_if_any()
    if not rows:
        raise UserError(f'data_file {path} is empty: expected lines such as {{"src": "...", "tgt": "..."}}')
    return rows


def _read_row(record: Record, name: str | None, faults: FaultCollector) -> ScoredRow | None:
    place = f"{record.file}:{record.line_number}"
    for field in (REWARD, CHOSEN, REJECTED):
        if field in record.fields:
            faults.add(f"{place}: {field} is there already and is what would be written: rename it")
            return None
    first: FaultCollector | None = None
    for kind in _kinds(record):
        own = FaultCollector()
        options = ReadOptions(recognised_format=recognise([record]) or name, comparison=kind)
        found = list(convert([record], own, options))
        if found:
            return _row_of(record, found, is_pair=kind == PAIRS)
        first = first or own
    told = first.messages if first else ()
    for fault in told or (f"{place}: there are no two answers that differ: nothing to compare",):
        faults.add(fault)
    return None


def _kinds(record: Record) -> tuple[str | None, ...]:
    """What a record may compare, the likelier first."""
    filled = {name for name, value in record.fields.items() if not is_null(value)}
    if is_preference(filled):
        return (PAIRS, MARKED)
    return (MARKED,) if filled & QUALITY_MARKS else (None,)


def _row_of(record: Record, found: Sequence[Conversation], *, is_pair: bool) -> ScoredRow:
    return ScoredRow(record.fields, tuple(_answers(found, is_pair=is_pair)), is_pair)


def _answers(found: Sequence[Conversation], *, is_pair: bool) -> Iterator[Conversation]:
    """Each answer alone, marked as the encoding of preference data wants it."""
    single = Comparison(desirable=True)
    yield replace(found[0], comparison=single)
    for each in found if is_pair else ():
        assert each.comparison is not None and each.comparison.rejected is not None
        messages = (*each.messages[:-1], each.comparison.rejected)
        yield replace(each, messages=messages, comparison=single)
