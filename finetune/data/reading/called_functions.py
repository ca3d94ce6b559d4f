"""Calls of functions in OpenAI's form, as the text of an answer: one JSON object with name and arguments a line."""

from __future__ import annotations

import json
from typing import Any

from finetune.data.reading.notes import CALL_WITHOUT_ARGUMENTS, ReadingNotes
from finetune.data.reading.records import Record, RecordError, describe_type
from finetune.data.reading.values import is_null


def write_calls(record: Record, calls: Any, name: str, notes: ReadingNotes) -> str:
    """The calls as text.

    Args:
        record: Where they stand, for messages.
        calls: ``tool_calls``, a list, or ``function_call``, an object.
        name: What to call them, such as "messages[3].tool_calls".
        notes: What is read by a rule or not used is counted here.

    Raises:
        RecordError: A call is no object with a name, or its arguments are no JSON object.
    """
    several = isinstance(calls, list)
    written = []
    for number, call in enumerate(calls if several else [calls]):
        place = f"{name}[{number}]" if several else name
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict):
            raise RecordError(record, f"{place} is {describe_type(function)}, expected an object")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise RecordError(record, f"{place} has no name of a function")
        if "parameters" not in function or "arguments" in function:
            arguments = _read_arguments(record, function.get("arguments"), f"{place}.arguments", notes)
            function = {**function, "arguments": arguments}
        written.append(json.dumps(function, ensure_ascii=False))
    return "\n".join(written)


def read_call_ids(calls: Any) -> str:
    """The ids of calls, one a line; "" unless all have one."""
    given = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    ids = [each for each in given if isinstance(each, str) and each and "\n" not in each]
    return "\n".join(ids) if len(ids) == len(given) else ""


def _read_arguments(record: Record, value: Any, name: str, notes: ReadingNotes) -> dict[str, Any]:
    """The arguments of a call; none where they are missing, null or empty."""
    if is_null(value) or (isinstance(value, str) and not value.strip()):
        notes.add(CALL_WITHOUT_ARGUMENTS)
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise RecordError(
                record, f"{name} is text that is no JSON ({reason}): write the arguments as a JSON object"
            ) from None
    if not isinstance(value, dict):
        raise RecordError(
            record, f"{name} is {describe_type(value)}, expected an object of arguments by name"
        )
    return value
