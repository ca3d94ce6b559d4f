"""The lines of a file as conversations that wait for an answer.

Every format of training data is read; answers may be missing. An answer that is there is the reference and
does not enter the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.reading.conversation import TOOL, USER, Conversation
from finetune.data.reading.formats import NUM_RECORDS_LOOKED_AT, recognise, to_conversation
from finetune.data.reading.message_lists import read_message
from finetune.data.reading.notes import ReadingNotes
from finetune.data.reading.pairs import ANSWER_FIELDS, PROMPT_FIELDS
from finetune.data.reading.readers import read_file
from finetune.data.reading.records import FaultCollector, Record, RecordError
from finetune.errors import UserError

OUTPUT, REFERENCE = "output", "reference"


@dataclass(frozen=True)
class Request:
    """One line of the input.

    Attributes:
        fields: The object as it was read.
        conversation: It, its last answer "" where there is none.
    """

    fields: dict[str, Any]
    conversation: Conversation

    def result(self, text: str) -> dict[str, Any]:
        """The line of the output: the object with its answer; an `output` of its own becomes `reference`."""
        fields = dict(self.fields)
        if OUTPUT in fields:
            fields[REFERENCE] = fields.pop(OUTPUT)
        return fields | {OUTPUT: text}


def read_records(path: Path, faults: FaultCollector) -> list[Record]:
    """The objects of a file; lines that hold none are added to the faults.

    Raises:
        UserError: It is missing.
    """
    if not path.is_file():
        raise UserError(f"data_file {path} is no file: give one with a JSON object on each line (or a .csv)")
    return list(read_file(path, faults))


def read_requests(path: Path) -> list[Request]:
    """Reads all lines of a file.

    Raises:
        UserError: It is missing or empty, or lines are faulty; all faults together.
    """
    faults = FaultCollector()
    records = read_records(path, faults)
    name = _recognise(records[:1]) or _recognise(records[:NUM_RECORDS_LOOKED_AT])
    requests = []
    for record in records:
        try:
            requests.append(Request(record.fields, _prompt_of(record, name)))
        except RecordError as error:
            faults.add(error.faults[0])
    faults.raise_if_any()
    if not requests:
        raise UserError(f'data_file {path} is empty: expected lines such as {{"src": "..."}}')
    return requests


def _recognise(records: list[Record]) -> str | None:
    """The format of records whose answers may be missing."""
    name = recognise(records)
    if name is None and any(not record.fields.keys().isdisjoint(PROMPT_FIELDS) for record in records):
        return "query_response"
    return name


def _prompt_of(record: Record, name: str | None) -> Conversation:
    if name == "text":
        raise RecordError(record, "running text has no prompt: name the field src to have it continued")
    if OUTPUT in record.fields and REFERENCE in record.fields:
        raise RecordError(
            record, "both output and reference are there, but output is kept as reference: rename one"
        )
    filled = _FILLS[name](record) if name in _FILLS else record
    conversation = to_conversation(filled, name)
    if conversation.is_text or not any(turn.prompt.strip() for turn in conversation.turns):
        raise RecordError(record, "the prompt is empty: there is nothing to answer")
    return conversation


def _fill_target(record: Record) -> Record:
    if "src" not in record.fields:
        return record  # refused next, by the fields that the file has
    sources, targets = record.fields["src"], record.fields.get("tgt")
    if not isinstance(sources, list):
        return record if targets is not None else _with(record, "tgt", "")
    answered = targets or []
    if isinstance(answered, list) and len(sources) == len(answered) + 1:
        return _with(record, "tgt", [*answered, ""])
    return record


def _fill(field: str) -> Callable[[Record], Record]:
    def fill(record: Record) -> Record:
        has_answer = any(record.fields.get(name) is not None for name in ANSWER_FIELDS)
        if has_answer or record.fields.keys().isdisjoint(PROMPT_FIELDS):
            return record
        return _with(record, field, "")

    return fill


def _fill_messages(field: str) -> Callable[[Record], Record]:
    def fill(record: Record) -> Record:
        messages = record.fields.get(field)
        if not isinstance(messages, list) or not messages:
            return record
        if isinstance(messages[-1], dict) and not messages[-1].keys() & {"role", "from"}:
            return record
        last = read_message(record, messages[-1], f"{field}[{len(messages) - 1}]", ReadingNotes())
        if last.role not in (USER, TOOL):
            return record
        return _with(record, field, [*messages, {"role": "assistant", "content": ""}])

    return fill


def _with(record: Record, name: str, value: Any) -> Record:
    return record.with_fields({**record.fields, name: value})


_FILLS: dict[str | None, Callable[[Record], Record]] = {
    "src_tgt": _fill_target,
    "alpaca": _fill("output"),
    "query_response": _fill("response"),
    "messages": _fill_messages("messages"),
    "sharegpt": _fill_messages("conversations"),
}
