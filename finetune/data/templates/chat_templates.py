"""The forms of conversations that have a name, and how a conversation is written in one of them.

Those of one family's models stand in its record; see `finetune.families.chat_format`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finetune.data.reading.conversation import TOOL, TOOL_CALL, USER, Conversation, Message
from finetune.data.templates.pieces import Piece, PieceWriter, Slot, parse_pattern
from finetune.data.templates.tool_calls import describe_tools, write_calls
from finetune.families.chat_format import CHATML, ChatFormat
from finetune.families.registry import families

_OF_NO_FAMILY = {
    "chatml": CHATML,
    "alpaca": ChatFormat(
        system="{content}\n\n",
        user="### Instruction:\n{content}\n\n### Response:\n",
        after="\n\n",
        default_system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
        ),
    ),
    "vicuna": ChatFormat(
        system="{content} ",
        user="USER: {content} ASSISTANT:",
        answer=" {content}",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
}


def _collect_formats() -> dict[str, ChatFormat]:
    """Forms that models of several families were trained with, and those of every record."""
    found = dict(_OF_NO_FAMILY)
    for family in families().values():
        if twice := found.keys() & family.chat_formats.keys():
            raise ValueError(f"family {family.name} writes a form of another: {', '.join(sorted(twice))}")
        found |= family.chat_formats
    return found


CHAT_FORMATS = _collect_formats()


class NamedTemplate:
    """A template out of `CHAT_FORMATS`.

    Args:
        name: Its key.
        tokens: Names of the tokenizer's special tokens; where the format writes one as text, such as ``[INST]``,
            it is that token.
    """

    def __init__(self, name: str, tokens: Sequence[str] = ()):
        self._tokens = tuple(tokens)
        chat = CHAT_FORMATS[name]
        self.name = name
        self.special_tokens = chat.special_tokens
        self.appends_eos = not (chat.end or chat.ends_with_next)
        self._ends_with_next = chat.ends_with_next
        self._trims, self._tools = chat.trims, chat.tools
        self._default_system = chat.default_system
        self._opening = self._parse(chat.opening)
        self._system = self._parse(chat.system)
        self._user = self._parse(chat.user)
        self._only_user = self._user if chat.only_user is None else self._parse(chat.only_user)
        self._first_round = chat.first_round
        self._tool = self._parse(chat.tool if chat.tool is not None else chat.user)
        self._answer = self._parse(chat.answer + chat.end)
        self._after = self._parse(chat.after)
        self._system_in_user = Slot("data", "system") in self._user

    def render(self, conversation: Conversation) -> list[Piece]:
        """Every message, the answers learned."""
        writer = self._write(conversation, len(conversation.messages) - 1)
        last = conversation.messages[-1]
        self._write_answer(writer, last)
        if self._ends_with_next:
            self._fill(writer, (self._tool if last.role == TOOL_CALL else self._user)[:1], {}, learned=True)
        return writer.finish()

    def render_prompt(self, conversation: Conversation) -> list[Piece]:
        """What stands before the last answer."""
        return self._write(conversation, len(conversation.messages) - 1).finish()

    def _parse(self, pattern: str) -> tuple[Slot, ...]:
        names = tuple(dict.fromkeys((*self.special_tokens, *self._tokens)))
        return parse_pattern(pattern, ("content", "round", "system"), names)

    def _write(self, conversation: Conversation, num_messages: int) -> PieceWriter:
        writer = PieceWriter()
        self._fill(writer, self._opening, {})
        functions = (
            describe_tools(self._tools, conversation.tools) if self._tools and conversation.tools else None
        )
        if functions is not None:
            self._fill(writer, self._system, {"content": functions})
            conversation = replace(conversation, tools=None)
        system = self._trimmed("system", conversation.system_text(self._default_system))
        if system and not self._system_in_user:
            self._fill(writer, self._system, {"content": system})
        is_single = sum(message.role in (USER, TOOL) for message in conversation.messages[:num_messages]) == 1
        user = self._only_user if is_single else self._user
        round_number = self._first_round - 1
        for place, message in enumerate(conversation.messages[:num_messages]):
            if message.role in (USER, TOOL):
                round_number += message.role == USER
                content = self._trimmed("user", message.content)
                values = {"content": content, "round": str(round_number), "system": system}
                slots = user if message.role == USER else self._tool
                if self._ends_with_next and place > 0:
                    self._fill(writer, slots[:1], values, learned=True)
                    slots = slots[1:]
                self._fill(writer, slots, values)
                system = ""
            else:
                self._write_answer(writer, message)
                self._fill(writer, self._after, {})
        return writer

    def _write_answer(self, writer: PieceWriter, message: Message) -> None:
        text = self._trimmed("answer", message.content)
        if self._tools is None or message.role != TOOL_CALL:
            self._fill(writer, self._answer, {"content": text}, learned=True)
            return
        text, calls = write_calls(self._tools, text)
        if text or not calls:
            self._fill(writer, self._answer, {"content": text}, learned=True)
        for place, call in enumerate(calls):
            if text or place:
                writer.write("special", self._tools.opening, learned=True)
            writer.write("data", call, learned=True)

    def _trimmed(self, whose: str, text: str) -> str:
        return text.strip() if whose in self._trims else text

    def _fill(
        self, writer: PieceWriter, slots: tuple[Slot, ...], values: dict[str, str], *, learned: bool = False
    ) -> None:
        for kind, value in slots:
            if kind != "data":
                writer.write(kind, value, learned=learned)
            elif value != "system":
                writer.write(kind, values[value], learned=learned)
            elif values["system"]:
                self._fill(writer, self._system, {"content": values["system"]})
