"""Lists of messages, in the spelling of ChatML and OpenAI (role, content) or of ShareGPT (from, value).

What stands out of order is put in order by rules that docs/data.md states, and counted:

- several prompts or several answers in a row are one, with a line break between;
- a system message further on goes in front of the next prompt, those at the beginning are one;
- answers before the first prompt and prompts behind the last answer are left out;
- an empty answer among others stays, and is not learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune.data.reading import notes as rules
from finetune.data.reading.called_functions import read_call_ids, write_calls
from finetune.data.reading.conversation import ASSISTANT, TOOL, TOOL_CALL, USER, Message
from finetune.data.reading.marks import LEARNED_MARKS, read_learned
from finetune.data.reading.notes import ReadingNotes
from finetune.data.reading.records import Record, RecordError, describe_type
from finetune.data.reading.values import find_halves, is_null, read_text

_SYSTEM = "system"
_ROLES = {
    **dict.fromkeys(("user", "human"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), ASSISTANT),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), TOOL),
    **dict.fromkeys(("tool_call", "function_call"), TOOL_CALL),
    **dict.fromkeys(("system", "developer"), _SYSTEM),
}
_PROMPTS, _ANSWERS = (USER, TOOL), (ASSISTANT, TOOL_CALL)
_JOINED = frozenset(
    {(USER, USER), (TOOL, TOOL), (ASSISTANT, ASSISTANT), (ASSISTANT, TOOL_CALL), (TOOL_CALL, TOOL_CALL)}
)
_COUNTED = {(USER, USER): rules.PROMPTS_JOINED, (ASSISTANT, ASSISTANT): rules.ANSWERS_JOINED}
_SPELLINGS = frozenset({"role", "from", "content", "value", "text"})
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TOOL_FIELDS = ("name", "tool_call_id")
_KNOWN = frozenset(
    {"role", "from", "content", "value", "text", "tool_calls", "function_call"}
    | LEARNED_MARKS
    | set(_REASONING)
)


def read_messages(record: Record, values: Sequence[Any], name: str, notes: ReadingNotes) -> list[Message]:
    """Reads the items of a list; one that is a whole round (such as human and assistant) gives two messages.

    Raises:
        RecordError: An item is no message.
    """
    messages: list[Message] = []
    for position, value in enumerate(values):
        if (plain := _read_plain(value)) is not None:
            messages.append(plain)
            continue
        if isinstance(value, dict) and "role" not in value and "from" not in value:
            prompt, answer = find_halves(value)
            if prompt and answer:
                messages += _read_round(record, value, f"{name}[{position}]", notes)
                continue
        messages.append(read_message(record, value, f"{name}[{position}]", notes))
    return messages


def _read_plain(value: Any) -> Message | None:
    """The fast way for a role and a text in the usual spelling; None for all else."""
    if type(value) is not dict or len(value) != 2:
        return None
    role, content = value.get("role"), value.get("content")
    if role is None:
        role, content = value.get("from"), value.get("value")
    if type(content) is not str or type(role) is not str or (known := _ROLES.get(role)) is None:
        return None
    return Message(known, content)


def read_message(record: Record, value: Any, name: str, notes: ReadingNotes) -> Message:
    """Reads one message.

    Args:
        record: Where it stands, for messages.
        value: The object.
        name: What to call it, such as "messages[3]".
        notes: What is read by a rule is counted here.

    Raises:
        RecordError: It is no object, lacks a field, or holds what cannot be read as text.
    """
    if not isinstance(value, dict):
        raise RecordError(record, f"{name} is {describe_type(value)}, expected an object")
    role_name = "role" if "role" in value else "from"
    is_value = role_name == "from" or ("value" in value and is_null(value.get("content")))
    content_name = "value" if is_value else "content"
    if content_name not in value and "text" in value:
        content_name = "text"
    aside = _SPELLINGS & value.keys() - {role_name, content_name}
    written = value.get(role_name)
    role = _ROLES.get(written.lower()) if isinstance(written, str) else None
    if role is None:
        shown = json.dumps(written, ensure_ascii=False)[:40] if role_name in value else "missing"
        raise RecordError(record, f"{name}: the role is {shown}, expected one of {', '.join(_ROLES)}")
    content = _read_content(record, value, content_name, f"{name}.{content_name}", notes)
    calls, ids = value.get("tool_calls") or value.get("function_call"), ""
    if calls and role == ASSISTANT:
        key = "tool_calls" if value.get("tool_calls") else "function_call"
        text = write_calls(record, calls, f"{name}.{key}", notes)
        role, content = TOOL_CALL, f"{content}\n{text}" if content else text
        ids = read_call_ids(calls)
    if value.keys() <= _PLAIN and not aside:
        return Message(role, content, call_id=ids)
    return _with_extras(record, Message(role, content, call_id=ids), value, name, notes, aside)


def order_messages(
    record: Record, messages: Sequence[Message], name: str, notes: ReadingNotes
) -> tuple[str | None, tuple[Message, ...]]:
    """Puts messages in order by the rules of this module, and parts the system text from them.

    Results of several tools that follow one another become one message, and so do an answer and the
    tool call behind it.

    Returns:
        The system text, if there is one, and messages as `Conversation` wants them.

    Raises:
        RecordError: They are in no order that a rule covers, or there is no answer.
    """
    first = 1 if messages and messages[0].role == _SYSTEM else 0
    roles = [message.role for message in messages]
    num_rounds = (len(roles) - first) // 2
    if num_rounds and roles[first:] == [USER, ASSISTANT] * num_rounds:  # nearly all are so
        return messages[0].content if first else None, mark_empty_answers(messages[first:], notes)
    system, rest = _take_system(messages, notes)
    ordered: list[Message] = []
    for position, message in rest:
        if not ordered and message.role in _ANSWERS:
            notes.add(rules.ANSWER_FIRST)
        elif ordered and (ordered[-1].role, message.role) in _JOINED:
            ordered[-1] = _join(record, ordered[-1], message, f"{name}[{position}]", notes)
        else:
            _check_order(record, ordered, message, f"{name}[{position}]")
            ordered.append(message)
    if not any(message.role in _ANSWERS for message in ordered):
        what = f"ends with a message from {ordered[-1].role}" if ordered else "holds no message"
        raise RecordError(record, f"{name} {what}, expected an answer to learn at the end")
    while ordered[-1].role in _PROMPTS:
        ordered.pop()
        notes.add(rules.PROMPT_LAST)
    return system, mark_empty_answers(ordered, notes)


def mark_empty_answers(messages: Sequence[Message], notes: ReadingNotes) -> tuple[Message, ...]:
    """Messages that alternate, with empty answers not learned where there are others: they teach silence."""
    blank = [place for place in range(1, len(messages), 2) if not messages[place].content.strip()]
    if not blank or 2 * len(blank) == len(messages):  # all are: nothing is left to learn, which is told
        return tuple(messages)
    notes.add(rules.EMPTY_ANSWER, len(blank))
    ordered = list(messages)
    for place in blank:
        ordered[place] = ordered[place]._replace(learned=False)
    return tuple(ordered)


def read_tools(record: Record) -> str | None:
    """The functions a record offers, as JSON text; None when there are none.

    Raises:
        RecordError: They are neither a list or object nor text that is one as JSON.
    """
    tools = record.fields.get("tools")
    if is_null(tools) or (isinstance(tools, str) and not tools.strip()):
        return None
    if isinstance(tools, str):
        try:
            parsed = json.loads(tools)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise RecordError(
                record, f"tools is text that is no JSON ({reason}): write a list of functions as JSON"
            ) from None
        text = tools
    else:
        parsed, text = tools, ""
    if parsed is None:
        return None
    if not isinstance(parsed, list | dict):
        raise RecordError(record, f"tools is {describe_type(parsed)}, expected a list or JSON text")
    return (text or json.dumps(parsed, ensure_ascii=False)) if parsed else None


_PLAIN = frozenset({"role", "from", "content", "value", "text", "tool_calls", "function_call"})


def _read_round(
    record: Record, value: Mapping[str, Any], name: str, notes: ReadingNotes
) -> Iterator[Message]:
    """The messages of an object with a prompt and an answer, and perhaps a system text."""
    prompt, answer = find_halves(value)
    system = value.get("system")
    if not is_null(system) and system != "":
        yield Message(_SYSTEM, read_text(record, system, f"{name}.system", notes))
    for role, key in ((USER, prompt), (ASSISTANT, answer)):
        if not is_null(value[str(key)]):
            yield Message(role, read_text(record, value[str(key)], f"{name}.{key}", notes))
    for key in value.keys() - {prompt, answer, "system"}:
        notes.unused_fields[f"{name.partition('[')[0]}[].{key}"] += 1


def _with_extras(
    record: Record,
    message: Message,
    value: Mapping[str, Any],
    name: str,
    notes: ReadingNotes,
    aside: frozenset[str],
) -> Message:
    """The message with its mark and its reasoning, or the name of its tool; what else it has is noted as not used, and so is `aside`."""
    learned = read_learned(record, value, f"{name}.")
    reasoning = next((value[key] for key in _REASONING if not is_null(value.get(key))), "")
    if message.role not in _ANSWERS:
        if learned and not value.get("weight"):
            notes.add(rules.PROMPT_MARKED)
    else:
        if learned is False:
            notes.add(rules.ANSWER_UNLEARNED)
        if isinstance(reasoning, str) and reasoning:
            message = message._replace(reasoning=reasoning)
        message = message._replace(learned=learned is not False)
    if reasoning and not (message.role in _ANSWERS and isinstance(reasoning, str)):
        aside = aside | {next(key for key in _REASONING if not is_null(value.get(key)))}
    used = _KNOWN
    if message.role == TOOL:
        used |= {key for key in _TOOL_FIELDS if isinstance(value.get(key), str)}
        tool, call = (str(value[key]) if key in used else "" for key in _TOOL_FIELDS)
        message = message._replace(tool=tool, call_id=call)
    for key in (value.keys() - used) | aside:
        if not is_null(value[key]):
            notes.unused_fields[f"{name.partition('[')[0]}[].{key}"] += 1
    return message


def _take_system(
    messages: Iterable[Message], notes: ReadingNotes
) -> tuple[str | None, list[tuple[int, Message]]]:
    """The system text at the beginning, and the others with their positions.

    A system message further on is put in front of the next user's message.
    """
    system: str | None = None
    inside: list[str] = []
    rest: list[tuple[int, Message]] = []
    for position, message in enumerate(messages):
        if message.role != _SYSTEM:
            if inside and message.role == USER:
                message = message._replace(content="\n".join([*inside, message.content]))
                inside = []
            rest.append((position, message))
        elif rest:
            inside.append(message.content)
            notes.add(rules.SYSTEM_INSIDE)
        else:
            notes.rules.update({rules.SYSTEMS_JOINED: 1} if system else {})
            system = f"{system}\n{message.content}" if system else message.content
    if inside:
        notes.add(rules.SYSTEM_LAST, len(inside))
        notes.rules.subtract({rules.SYSTEM_INSIDE: len(inside)})
        notes.rules += type(notes.rules)()  # without counts of 0
    return system, rest


def _join(record: Record, first: Message, second: Message, name: str, notes: ReadingNotes) -> Message:
    if first.learned != second.learned:
        raise RecordError(
            record, f"{name} follows another answer with another mark: mark both alike, or make them one"
        )
    if rule := _COUNTED.get((first.role, second.role)):
        notes.add(rule)
    reasoning = "\n".join(filter(None, (first.reasoning, second.reasoning)))
    if second.role in _ANSWERS:
        are_calls = first.role == second.role == TOOL_CALL
        ids = [first.call_id, second.call_id] if are_calls else [second.call_id]
        first = first._replace(call_id="\n".join(ids) if all(ids) else "")
    elif (first.tool, first.call_id) != (second.tool, second.call_id):
        notes.add(rules.TOOL_NAMES_JOINED)
        first = first._replace(tool="", call_id="")
    content = f"{first.content}\n{second.content}"
    return first._replace(role=second.role, content=content, reasoning=reasoning)


def _check_order(record: Record, ordered: Sequence[Message], message: Message, name: str) -> None:
    before = ordered[-1].role if ordered else None
    allowed = (USER,) if before is None else _ANSWERS if before in _PROMPTS else _PROMPTS
    if message.role not in allowed:
        raise RecordError(
            record,
            f"{name} is from {message.role}, expected {' or '.join(allowed)} "
            + (f"behind {before}" if before else "as the first"),
        )


def _read_content(
    record: Record, message: Mapping[str, Any], key: str, name: str, notes: ReadingNotes
) -> str:
    """Text as it is, the text parts of OpenAI's list form joined, and null of an answer or a tool as ""."""
    content = message.get(key)
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
        raise RecordError(record, f"{name} has parts that are no text; only text can be trained on")
    if is_null(content):
        if message.get("tool_calls") or message.get("function_call"):
            return ""
        if key not in message:
            raise RecordError(record, f"{name} is missing, expected a string")
        role = message.get("role", message.get("from"))
        if _ROLES.get(str(role).lower()) in (TOOL, ASSISTANT, USER):
            notes.add(rules.NULL_CONTENT)
            return ""
    if isinstance(content, dict) and _ROLES.get(str(message.get("role")).lower()) in (TOOL, TOOL_CALL):
        if "arguments" in content and _ROLES[str(message.get("role")).lower()] == TOOL_CALL:
            return write_calls(record, content, name, notes)
        return json.dumps(content, ensure_ascii=False)
    return read_text(record, content, name, notes)
