"""Lists of messages, in the spelling of ChatML and OpenAI (role, content) or of ShareGPT (from, value)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from finetune.data.reading.conversation import ASSISTANT, TOOL, TOOL_CALL, USER, Message
from finetune.data.reading.records import Record, RecordError, describe_type

_SYSTEM = "system"
_ROLES = {
    **dict.fromkeys(("user", "human"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), ASSISTANT),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), TOOL),
    **dict.fromkeys(("tool_call", "function_call"), TOOL_CALL),
    **dict.fromkeys(("system", "developer"), _SYSTEM),
}
_PROMPTS, _ANSWERS = (USER, TOOL), (ASSISTANT, TOOL_CALL)


def read_message(record: Record, value: Any, name: str) -> Message:
    """Reads one message.

    Args:
        record: Where it stands, for messages.
        value: The object.
        name: What to call it, such as "messages[3]".

    Raises:
        RecordError: It is no object, lacks a field, or holds what cannot be read as text.
    """
    if not isinstance(value, dict):
        raise RecordError(record, f"{name} is {describe_type(value)}, expected an object")
    role_name = "role" if "role" in value else "from"
    content_name = "value" if "value" in value or role_name == "from" else "content"
    role = value.get(role_name)
    if not isinstance(role, str) or role.lower() not in _ROLES:
        shown = json.dumps(role, ensure_ascii=False)[:40] if role_name in value else "missing"
        raise RecordError(record, f"{name}: the role is {shown}, expected one of {', '.join(_ROLES)}")
    content = _read_content(record, value.get(content_name), f"{name}.{content_name}", value)
    calls = value.get("tool_calls") or value.get("function_call")
    if calls and _ROLES[role.lower()] == ASSISTANT:
        written = _write_calls(calls)
        return Message(TOOL_CALL, f"{content}\n{written}" if content else written)
    return Message(_ROLES[role.lower()], content)


def read_message_list(
    record: Record, messages: Sequence[Message], name: str
) -> tuple[str | None, tuple[Message, ...]]:
    """Checks the order of messages, and parts the system text from them.

    Results of several tools that follow one another become one message, and so do an answer and the
    tool call behind it.

    Returns:
        The system text, if there is one, and messages as `Conversation` wants them.

    Raises:
        RecordError: They do not alternate between prompts and answers, or do not end with an answer.
    """
    system = None
    rest = list(enumerate(messages))
    if messages and messages[0].role == _SYSTEM:
        system, rest = messages[0].content, rest[1:]
    ordered: list[Message] = []
    for position, message in rest:
        before = ordered[-1].role if ordered else None
        if (before, message.role) in ((TOOL, TOOL), (ASSISTANT, TOOL_CALL), (TOOL_CALL, TOOL_CALL)):
            ordered[-1] = Message(message.role, f"{ordered[-1].content}\n{message.content}")
            continue
        allowed = (USER,) if before is None else _ANSWERS if before in _PROMPTS else _PROMPTS
        if message.role not in allowed:
            raise RecordError(
                record,
                f"{name}[{position}] is from {message.role}, expected {' or '.join(allowed)} "
                + (f"behind {before}" if before else "as the first"),
            )
        ordered.append(message)
    if not ordered or ordered[-1].role in _PROMPTS:
        what = f"ends with a message from {ordered[-1].role}" if ordered else "holds no message"
        raise RecordError(record, f"{name} {what}, expected an answer to learn at the end")
    return system, tuple(ordered)


def read_tools(record: Record) -> str | None:
    """The functions a record offers, as JSON text; None when there are none.

    Raises:
        RecordError: They are neither text nor a list.
    """
    tools = record.fields.get("tools")
    if isinstance(tools, str):
        return tools if tools.strip() not in ("", "[]") else None
    if tools is not None and not isinstance(tools, list):
        raise RecordError(record, f"tools is {describe_type(tools)}, expected a list or JSON text")
    return json.dumps(tools, ensure_ascii=False) if tools else None


def _read_content(record: Record, content: Any, name: str, message: dict[str, Any]) -> str:
    """Text as it is, the text parts of OpenAI's list form joined, and null beside a tool call as ""."""
    if isinstance(content, str):
        return content
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        return ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
        raise RecordError(record, f"{name} has parts that are no text; only text can be trained on")
    missing = content is None and not any(key in message for key in ("content", "value"))
    raise RecordError(
        record, f"{name} is {'missing' if missing else describe_type(content)}, expected a string"
    )


def _write_calls(calls: Any) -> str:
    """Tool calls as JSON: an object with name and arguments each, on lines of their own."""
    written = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):  # what is no JSON stays the text it is
                function = {**function, "arguments": json.loads(function["arguments"])}
        written.append(json.dumps(function, ensure_ascii=False))
    return "\n".join(written)
