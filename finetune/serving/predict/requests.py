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
from finetune.data.reading.formats import NUM_RECORDS_LOOKED_AT, recognise, replace_fields, to_conversation
from finetune.data.reading.message_lists import read_message
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


def read_requests(path: Path) -> list[Request]:
    """Reads all lines of a file.

    Raises:
        UserError: It is missing or empty, or lines are faulty; all faults together.
    """
    if not path.is_file():
        raise UserError(f"data_file {path} is no file: give one with a JSON object on each line (or a .csv)")
    faults = FaultCollector()
    records = list(read_file(path, faults))
    name = recognise([record.fields for record in records[:1]])
    if name in (None, "text"):
        name = recognise([record.fields for record in records[:NUM_RECORDS_LOOKED_AT]])
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


def _prompt_of(record: Record, name: str | None) -> Conversation:
    if name == "text":
        raise RecordError(record, "running text has no prompt: name the field src to have it continued")
    if OUTPUT in record.fields and REFERENCE in record.fields:
        raise RecordError(
            record, "both output and reference are there, but output is kept as reference: rename one"
        )
    filled = _FILLS[name](record) if name in _FILLS else record
    return to_conversation(filled, name)


def _fill_target(record: Record) -> Record:
    if "src" not in record.fields:
        return record  # refused next, by the fields that the file has
    sources, targets = record.fields["src"], record.fields.get("tgt")
    if not isinstance(sources, list):
        return record if targets is not None else replace_fields(record, tgt="")
    answered = targets or []
    if isinstance(answered, list) and len(sources) == len(answered) + 1:
        return replace_fields(record, tgt=[*answered, ""])
    return record


def _fill(field: str, prompt: str) -> Callable[[Record], Record]:
    def fill(record: Record) -> Record:
        if prompt not in record.fields:
            return record
        return record if record.fields.get(field) is not None else replace_fields(record, **{field: ""})

    return fill


def _fill_messages(field: str) -> Callable[[Record], Record]:
    def fill(record: Record) -> Record:
        messages = record.fields.get(field)
        if not isinstance(messages, list) or not messages:
            return record
        if read_message(record, messages[-1], f"{field}[{len(messages) - 1}]").role not in (USER, TOOL):
            return record
        return replace_fields(record, **{field: [*messages, {"role": "assistant", "content": ""}]})

    return fill


_FILLS: dict[str | None, Callable[[Record], Record]] = {
    "src_tgt": _fill_target,
    "alpaca": _fill("output", "instruction"),
    "query_response": _fill("response", "query"),
    "messages": _fill_messages("messages"),
    "sharegpt": _fill_messages("conversations"),
}
