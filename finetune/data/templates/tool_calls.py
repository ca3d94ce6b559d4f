"""Calls of functions in the text of an answer, taken apart for templates that write them from objects."""

from __future__ import annotations

import json
from typing import Any


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
