"""What every format is read into and every template writes down: messages with roles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

USER = "user"
TOOL = "tool"  # what a called function gave back
ASSISTANT = "assistant"
TOOL_CALL = "tool_call"  # an answer that calls a function, as JSON
TEXT = "text"  # running text without a prompt

_TOOL_NOTE = (
    "These functions can be called; a call is written as a JSON object with the keys name and arguments.\n"
)


class Message(NamedTuple):
    """One message.

    Attributes:
        role: One of the names above.
        content: Its text.
        learned: Of an answer, whether it carries labels; the others never do.
        reasoning: Of an answer, the thoughts that led to it, for templates that have a place for them.
        tool: Of a tool's result, the name of the tool, for templates that have a place for it.
        call_id: Of a tool's result, the id of the call that it answers, likewise; of calls their ids, one a line.
    """

    role: str
    content: str
    learned: bool = True
    reasoning: str = ""
    tool: str = ""
    call_id: str = ""


class Comparison(NamedTuple):
    """What preference methods know of an answer beside the answer itself.

    Attributes:
        rejected: The worse answer to the same prompt; None where the answer stands alone.
        desirable: Whether an answer that stands alone is good; None for a pair.
        margin: By how much the chosen answer is better; 0.0 where the data do not say.
    """

    rejected: Message | None = None
    desirable: bool | None = None
    margin: float = 0.0


class Turn(NamedTuple):
    """A prompt (of a user or a tool) and the answer to it."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example.

    The messages alternate: USER or TOOL, then ASSISTANT or TOOL_CALL, the last one an answer. Running
    text is a single message of the role TEXT. Answers that are not marked otherwise and running text are learned.

    Attributes:
        messages: At least one.
        system: The example's own system text; None leaves it to the template, "" means none.
        tools: Functions that may be called, as JSON text.
        file: Where the example was read, for messages; not compared.
        line_number: Its first line, counted from 1; not compared.
        is_pair: Whether the data gave a bare prompt and its answer (``src`` and ``tgt``), which a model's own
            template is not meant for unless someone asks for it; not compared.
        comparison: In data of a preference method, what the last answer is compared with.
        record_end: In such data, where its record ends in the file: examples of one record have the same, although
            many records may stand on one line; not compared.
    """

    messages: tuple[Message, ...]
    system: str | None = None
    file: Path = field(default=Path(), compare=False)
    line_number: int = field(default=0, compare=False)
    tools: str | None = None
    is_pair: bool = field(default=False, compare=False)
    comparison: Comparison | None = None
    record_end: int = field(default=0, compare=False)

    @property
    def is_text(self) -> bool:
        """Whether this is running text, learned from its first token on."""
        return self.messages[0].role == TEXT

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Prompts and their answers; running text is an answer to an empty prompt."""
        if self.is_text:
            return (Turn("", self.messages[0].content),)
        contents = [message.content for message in self.messages]
        return tuple(map(Turn, contents[0::2], contents[1::2]))

    @property
    def answers(self) -> tuple[Message, ...]:
        """The answers, or the running text."""
        return self.messages if self.is_text else self.messages[1::2]

    @property
    def place(self) -> str:
        """``FILE:LINE``, for messages."""
        return f"{self.file}:{self.line_number}"

    @property
    def origin(self) -> tuple[Path, int, int]:
        """The record that the example is of."""
        return self.file, self.line_number, self.record_end

    def system_text(self, default: str | None = None) -> str:
        """The system text with the functions that may be called; "" when there is neither."""
        system = self.system if self.system is not None else default or ""
        if not self.tools:
            return system
        return f"{system}\n\n{_TOOL_NOTE}{self.tools}" if system else _TOOL_NOTE + self.tools

    def shortened(self) -> Iterator[Conversation]:
        """The conversation with none, one, ... of its oldest rounds left out; the last one stays.

        A round is a user's message and all that follows it up to the next one, tool calls included.
        """
        yield self
        for start in range(1, len(self.messages)):
            if self.messages[start].role == USER:
                yield replace(self, messages=self.messages[start:])

    def up_to_each_answer(self) -> list[Conversation]:
        """The conversation up to each answer that is learned and not blank; none for running text."""
        return [
            replace(self, messages=self.messages[: place + 1])
            for place in range(1, len(self.messages), 2)
            if self.messages[place].learned and self.messages[place].content.strip()
        ]

    @property
    def num_rounds(self) -> int:
        """Number of user's messages; 1 for running text."""
        return [message.role for message in self.messages].count(USER) or 1


def make_conversation(
    turns: Iterable[tuple[str, str]],
    system: str | None = None,
    file: Path | None = None,
    line_number: int = 0,
) -> Conversation:
    """A conversation of plain (prompt, answer) pairs."""
    messages = tuple(
        message for prompt, answer in turns for message in (Message(USER, prompt), Message(ASSISTANT, answer))
    )
    return Conversation(messages, system, file or Path(), line_number)
