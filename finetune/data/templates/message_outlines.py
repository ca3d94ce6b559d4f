"""A message as far as its rendered form depends on it, and the object that a template is given for it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from finetune.data.reading.conversation import ASSISTANT, TOOL, TOOL_CALL, USER

# The role that a template is told. A tool's call is an answer whose text is the call.
_ROLE_NAMES = {USER: "user", TOOL: "tool", ASSISTANT: "assistant", TOOL_CALL: "assistant"}
# The private-use characters cannot stand in a template by chance.
PLACEHOLDER = "\ue0f0{}\ue0f1"


class Outline(NamedTuple):
    """All of a message that its rendered form depends on.

    Attributes:
        role: As in `Message`.
        calls: The functions that it calls, as a JSON list; "" for none.
        has_text: Whether it holds text besides.
        has_reasoning: Whether it holds thoughts.
        tool: Of a tool's result, the name of the tool.
        call_id: Of a tool's result, the id of the call; of calls their ids, one a line.
    """

    role: str
    calls: str = ""
    has_text: bool = True
    has_reasoning: bool = False
    tool: str = ""
    call_id: str = ""

    def write(self, index: int, num_messages: int, *, num_copies: int = 1) -> dict[str, Any]:
        """The message as templates know it, with placeholders for its texts, each so often in a row."""
        content, reasoning = (PLACEHOLDER.format(number) for number in (index, num_messages + index))
        return self.write_texts(content * num_copies, reasoning * num_copies)

    def write_texts(self, content: str, reasoning: str) -> dict[str, Any]:
        """The message as templates know it, with these texts as far as it has any."""
        message = write_message(self.role, content if self.has_text else "")
        if self.has_reasoning:
            message["reasoning_content"] = reasoning
        if self.role == TOOL:
            named = {"name": self.tool, "tool_call_id": self.call_id}
            message |= {key: value for key, value in named.items() if value}
        if self.calls:
            calls = [{"type": "function", "function": call} for call in json.loads(self.calls)]
            ids = self.call_id.split("\n")
            if self.call_id and len(ids) == len(calls):
                calls = [{"id": each, **call} for each, call in zip(ids, calls, strict=True)]
            message["tool_calls"] = calls
        return message


def write_message(role: str, content: str) -> dict[str, Any]:
    """A message of a role and a text alone."""
    return {"role": _ROLE_NAMES.get(role, role), "content": content}
