"""Functions on offer and calls of them: written as a family does, or taken apart for templates that take objects."""

from __future__ import annotations

import json
from typing import Any

from finetune.families.chat_format import ToolFormat


def describe_tools(form: ToolFormat, tools: str) -> str | None:
    """Functions on offer, given as JSON; None where they are of another shape."""
    try:
        listed = json.loads(tools)
    except (ValueError, RecursionError):
        return None
    functions = [_function_of(each) for each in (listed if isinstance(listed, list) else [listed])]
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in functions):
        return None
    written = (
        form.function.replace("{name}", each["name"], 1).replace(
            "{json}", json.dumps(each, ensure_ascii=False, indent=4), 1
        )
        for each in functions
    )
    return form.head + "".join(written)


def write_calls(form: ToolFormat, text: str) -> tuple[str, list[str]]:
    """The text of an answer before its calls, and these one by one; see `split_calls`."""
    before, calls = split_calls(text)
    written = []
    for call in json.loads(calls) if calls else []:
        arguments = call["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        written.append(form.call.replace("{name}", call["name"], 1).replace("{arguments}", arguments, 1))
    return before, written


def _function_of(tool: Any) -> Any:
    return tool.get("function", tool) if isinstance(tool, dict) else tool


def split_calls(text: str) -> tuple[str, str]:
    """The text of an answer before its calls, and these as a JSON list; "" where there is none.

    Args:
        text: Ends with JSON objects that have the keys name and arguments, one a line, or is a single one or a
            list of them on several lines.
    """
    whole = _read_calls(text)
    if whole is not None:
        return "", json.dumps(whole, ensure_ascii=False)
    lines = text.split("\n")
    calls: list[Any] = []
    while lines and (found := _read_calls(lines[-1])) is not None:
        calls = found + calls
        lines.pop()
    return ("\n".join(lines), json.dumps(calls, ensure_ascii=False)) if calls else (text, "")


def _read_calls(text: str) -> list[Any] | None:
    if not text.strip().startswith(("{", "[")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = value if isinstance(value, list) else [value]
    is_call = [
        isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call for call in calls
    ]
    return calls if calls and all(is_call) else None
