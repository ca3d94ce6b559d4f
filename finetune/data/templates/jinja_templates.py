"""Jinja templates in the style of Hugging Face: one text that writes a whole list of messages.

Such a template says nothing about what is learned. That is found by rendering longer and longer parts of
a conversation: what the answer adds to the text that asks for it is learned. This is right only where a
longer part repeats the shorter one, so a template that writes earlier rounds anew is refused.

The messages' texts are not rendered: placeholders are, and the text around them shows what is the
template's own. So no text of an example can become a special token, and the result depends on the roles
alone and is remembered. A template that trims texts is noticed, and the texts are trimmed here.
Only what a template writes from an object, the functions on offer and the calls of them, is rendered as it is.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.data.reading.conversation import ASSISTANT, TOOL, TOOL_CALL, USER, Conversation, Message
from finetune.data.templates.jinja_environment import CHAT, GENERATION_END, GENERATION_START
from finetune.data.templates.message_outlines import Outline, write_message
from finetune.data.templates.pieces import Piece, PieceWriter, RefusedConversationError, Slot, parse_pattern
from finetune.data.templates.template_rendering import Renderer, RenderError, SourceError
from finetune.data.templates.template_worker import Variant
from finetune.data.templates.tool_calls import split_calls
from finetune.errors import UserError

_MAX_REMEMBERED = 4096
_PLACEHOLDERS = re.compile("\ue0f0([0-9]+)\ue0f1")
_TOKEN_LIKE = re.compile(r"<\|[^|<>\s]+\|>|</?s>|<(?:start|end)_of_turn>|<[be]os>")
_SYSTEM = "system"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")
_TRIAL = "\t\ue0f3\t"
_TRIAL_LETTERS, _TRIAL_THOUGHTS = "aBc D\u00e9 1", "aB<think>c</think>d E"
_END_OF_THOUGHTS = "</think>"
_TRIED_TOOLS = json.dumps([{
    "type": "function",
    "function": {
        "name": "x",
        "description": "x",
        "parameters": {
            "type": "object",
            "properties": {"y": {"type": "string", "description": "y"}},
            "required": ["y"],
        },
    },
}])  # fmt: skip


class JinjaTemplate:
    """A template that takes ``messages``, ``add_generation_prompt``, ``bos_token``, ``eos_token``, ``tools``.

    Args:
        source: The template's text.
        name: What to call it in messages, usually the path.
        tokens: Special tokens by role: "bos_token", "eos_token" and others that the tokenizer names.
        special_tokens: Texts of more special tokens.
        needs_tools: Whether it is meant for conversations that offer functions, and may fail without any.

    Raises:
        UserError: No valid jinja, or it does not write conversations in a way that can be learned from.
    """

    def __init__(
        self,
        source: str,
        name: str,
        tokens: Mapping[str, str],
        special_tokens: Sequence[str] = (),
        *,
        needs_tools: bool = False,
    ):
        self._name = name
        self._tried_tools = _TRIED_TOOLS if needs_tools else None
        self._tokens = dict(tokens)
        try:
            self._renderer = Renderer(source, name, CHAT)
        except SourceError as error:
            raise UserError(f"{name}: no valid jinja ({error}).") from None
        found = {*_TOKEN_LIKE.findall(source), *self._tokens.values(), *special_tokens} - {""}
        self._specials = tuple(sorted(found))
        self._takes_tools = "tools" in source
        self._takes_reasoning = "reasoning_content" in source
        self._marks_learned = _GENERATION.search(source) is not None
        self.special_tokens: tuple[str, ...] = ()  # a name that the tokenizer lacks is written as text
        self._closing = ""
        self._remembered = functools.lru_cache(maxsize=_MAX_REMEMBERED)(self._find_slots)
        self._trimmed = self._find_trimmed()
        self._alters_thoughts = self._alters(_TRIAL_THOUGHTS)
        self._takes_empty_system = self._find_default_system()
        self._takes_calls = "tool_calls" in source and self._writes_calls()
        self.appends_eos = not self._has_end_mark()
        if self._alters(_TRIAL_LETTERS):
            raise UserError(
                f"{self._name}: changes the text of answers, so that a model would learn another one. Give chat_template "
                "another name or file."
            )

    def render(self, conversation: Conversation) -> list[Piece]:
        """Every message, the answers learned."""
        return self._write(conversation, for_training=True)

    def render_prompt(self, conversation: Conversation) -> list[Piece]:
        """What stands before the last answer."""
        return self._write(conversation, for_training=False)

    def _write(self, conversation: Conversation, *, for_training: bool) -> list[Piece]:
        messages = [self._describe(message) for message in conversation.messages]
        tools = conversation.tools if self._takes_tools else None
        system = conversation.system if tools else conversation.system_text()
        if system or (conversation.system == "" and self._takes_empty_system):
            messages.insert(0, (Outline(_SYSTEM), system or "", ""))
        if self._alters_thoughts and any(
            _END_OF_THOUGHTS in answer.content for answer in conversation.answers
        ):
            raise RefusedConversationError(
                f"{self._name}: cannot be used for {conversation.place}: it leaves the thoughts before {_END_OF_THOUGHTS} "
                "out of answers. Take them out of the data, or give chat_template another name or file."
            )
        outlines = tuple(outline for outline, _, _ in messages)
        texts = [text for _, text, _ in messages] + [reasoning for _, _, reasoning in messages]
        try:
            self._refuse_token_names("tools", tools)
            for outline in outlines:
                self._refuse_token_names("calls of functions", outline.calls)
            slots = self._remembered(outlines, tools, for_training)
        except RenderError as error:
            raise RefusedConversationError(f"{self._name}: fails on {conversation.place}: {error}.") from None
        except _InconsistentError as error:
            raise RefusedConversationError(
                f"{self._name}: cannot be used for {conversation.place}: {error}"
            ) from None
        writer = PieceWriter()
        for slot, learned in slots:
            if slot.kind != "data":
                writer.write(slot.kind, slot.value, learned=learned)
                continue
            index = int(slot.value)
            is_trimmed = index < len(outlines) and outlines[index].role in self._trimmed
            writer.write("data", texts[index].strip() if is_trimmed else texts[index], learned=learned)
        return writer.finish()

    def _describe(self, message: Message) -> tuple[Outline, str, str]:
        """A message's outline, its text, and its thoughts."""
        text, calls = message.content, ""
        if self._takes_calls and message.role == TOOL_CALL:
            text, calls = split_calls(text)
        reasoning = message.reasoning.strip("\n") if self._takes_reasoning else ""
        return Outline(message.role, calls, bool(text) or not calls, bool(reasoning)), text, reasoning

    def _refuse_token_names(self, what: str, text: str | None) -> None:
        """What the template renders itself of an example must not name special tokens."""
        named = [token for token in self._specials if token in (text or "")]
        if named:
            raise RenderError(f"its {what} contain {named[0]!r}, which is a special token")

    def _writes_calls(self) -> bool:
        """Whether the template writes calls of functions from objects; some ask for more than data have."""
        call = json.dumps([{"name": "x", "arguments": {"y": 1}}])
        roles = (USER, TOOL_CALL, TOOL, ASSISTANT)
        outlines = tuple(Outline(role, call, False) if role == TOOL_CALL else Outline(role) for role in roles)
        try:
            self._find_slots(outlines, self._tried_tools, True)
        except (RenderError, _InconsistentError):
            return False
        return True

    def _find_slots(
        self, outlines: tuple[Outline, ...], tools: str | None, for_training: bool
    ) -> tuple[tuple[Slot, bool], ...]:
        """The text of messages of these outlines in slots, each with its flag.

        The thoughts of message `i` of `n` have the number `n + i`.

        Raises:
            _InconsistentError: What comes later changes what was written for earlier messages.
        """
        roles = [outline.role for outline in outlines]
        messages = [outline.write(index, len(outlines)) for index, outline in enumerate(outlines)]
        num_messages = len(roles) - 1
        if self._marks_learned and for_training:
            return self._find_marked_slots(outlines, messages, tools)
        answers = [index for index, role in enumerate(roles) if role in (ASSISTANT, TOOL_CALL)]
        parts = [(count, asks) for index in answers for count, asks in ((index, True), (index + 1, False))]
        whole = (len(roles), False)
        if not for_training and answers and answers[-1] == num_messages:
            parts.pop()
        elif for_training and whole not in parts:
            parts.append(whole)
        slots: list[tuple[Slot, bool]] = []
        written = ""
        texts = self._render(messages, tools, parts)
        for (count, asks), text in zip(parts, texts, strict=True):
            if (count, asks) == whole and num_messages not in answers and text != written:
                raise _InconsistentError
            slots += self._parse_added(written, text, learned=not asks)
            written = text
        _check_seen(slots, outlines[: None if for_training else num_messages])
        return tuple(self._close(slots, learns_last=for_training))

    def _find_marked_slots(
        self, outlines: Sequence[Outline], messages: Sequence[Mapping[str, Any]], tools: str | None
    ) -> tuple[tuple[Slot, bool], ...]:
        """The same for a template that says itself what is learned."""
        text = next(self._render(messages, tools, [(len(messages), False)], keeps_marks=True))
        slots: list[tuple[Slot, bool]] = []
        for position, part in enumerate(_MARKS.split(text)):
            slots += [(slot, position % 2 == 1) for slot in self._parse(part)]
        _check_seen(slots, outlines)
        if not any(learned for _, learned in slots):
            raise RenderError("its generation marks stand around no answer")
        return tuple(slots)

    def _close(self, slots: list[tuple[Slot, bool]], *, learns_last: bool) -> list[tuple[Slot, bool]]:
        """Slots in which the mark that closes an answer is learned, and closes the last one too.

        Some templates close an answer only when another message follows it.
        """
        if not self._closing or not learns_last:
            return slots
        closed: list[tuple[Slot, bool]] = []
        for number, (slot, learned) in enumerate(slots):
            follows_answer = number > 0 and slots[number - 1][1] and slot == Slot("special", self._closing)
            closed.append((slot, learned or follows_answer))
        return [*closed, (Slot("special", self._closing), True)]

    def _parse_added(self, shorter: str, longer: str, *, learned: bool) -> list[tuple[Slot, bool]]:
        if not longer.startswith(shorter):
            raise _InconsistentError
        added = longer[len(shorter) :]
        text = added
        if learned and added.rstrip().endswith(self._specials or ("\ue0f2",)):
            text = added.rstrip()  # the line break behind an end mark belongs to no answer
        slots = [(slot, learned) for slot in self._parse(text)]
        return [*slots, *((slot, False) for slot in self._parse(added[len(text) :]))]

    def _parse(self, text: str) -> list[Slot]:
        slots: list[Slot] = []
        for position, part in enumerate(_PLACEHOLDERS.split(text)):  # text, index, text, index, ..., text
            slots += [Slot("data", part)] if position % 2 else parse_pattern(part, (), self._specials)
        return slots

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: str | None,
        parts: Sequence[tuple[int, bool]],
        *,
        keeps_marks: bool = False,
    ) -> Iterator[str]:
        """The text of so many messages of the front, each time with or without what asks for an answer."""
        values = {**self._tokens, "tools": _parse_tools(tools) if tools else None, "messages": list(messages)}
        texts = self._renderer.render_all(
            values, [Variant({"add_generation_prompt": asks}, count) for count, asks in parts]
        )
        return iter(texts) if keeps_marks else (_MARKS.sub("", text) for text in texts)

    def _find_default_system(self) -> bool:
        """Whether an empty system text keeps the template from writing one of its own."""
        texts = []
        for roles in ((USER, ASSISTANT), (_SYSTEM, USER, ASSISTANT)):
            messages = [write_message(role, "" if role == _SYSTEM else "x") for role in roles]
            try:
                texts.append(next(self._render(messages, self._tried_tools, [(len(roles), False)])))
            except RenderError:
                return False
        return len(texts[1]) < len(texts[0])

    def _alters(self, answer: str) -> bool:
        """Whether the template writes another text than this for an answer, be it the last one or not."""
        messages = [
            write_message(role, answer if role == ASSISTANT else "x") for role in (USER, ASSISTANT) * 2
        ]
        try:
            text = next(self._render(messages, self._tried_tools, [(len(messages), False)]))
        except RenderError:
            return False  # it is told where it is of consequence
        return text.count(answer) != 2

    def _find_trimmed(self) -> frozenset[str]:
        """The roles whose texts the template trims, found with a text that has blanks around it."""
        trimmed: set[str] = set()
        roles = (_SYSTEM, USER, ASSISTANT, USER, ASSISTANT)
        for role, tried in ((_SYSTEM, roles), (USER, roles[1:]), (ASSISTANT, roles[1:])):
            messages = [write_message(name, _TRIAL if name == role else "x") for name in tried]
            try:
                text = next(self._render(messages, self._tried_tools, [(len(tried), False)]))
            except RenderError as error:
                if role == _SYSTEM:  # some templates take no system text; it is told where data has one
                    continue
                raise UserError(f"{self._name}: fails on a trial conversation: {error}.") from None
            if _TRIAL not in text:
                trimmed |= {role, TOOL if role == USER else TOOL_CALL if role == ASSISTANT else role}
        return frozenset(trimmed)

    def _has_end_mark(self) -> bool:
        """Whether answers end with a special token; also refuses what cannot be learned from."""
        try:
            outlines = tuple(map(Outline, (USER, ASSISTANT, USER, ASSISTANT)))
            slots = self._find_slots(outlines, self._tried_tools, True)
        except RenderError as error:
            raise UserError(f"{self._name}: fails on a trial conversation: {error}.") from None
        except _InconsistentError as error:
            raise UserError(f"{self._name}: cannot be used for training: {error}") from None
        learned = [slot for slot, is_learned in slots if is_learned]
        if learned[-1].kind != "special" and not self._marks_learned:
            self._closing = _find_closing(slots)
            self._remembered.cache_clear()
        return learned[-1].kind == "special" or bool(self._closing)


def _find_closing(slots: Sequence[tuple[Slot, bool]]) -> str:
    """The special token that follows each answer but the last; "" where there is none."""
    places = [place for place, (_, learned) in enumerate(slots) if learned]
    behind = [slots[place + 1][0] for place in places[:-1] if not slots[place + 1][1]]
    is_last = bool(places) and places[-1] + 1 == len(slots)
    return behind[0].value if is_last and behind and behind[0].kind == "special" else ""


def _check_seen(slots: Sequence[tuple[Slot, bool]], outlines: Sequence[Outline]) -> None:
    seen = {int(slot.value) for slot, _ in slots if slot.kind == "data"}
    lost = [each.role for index, each in enumerate(outlines) if each.has_text and index not in seen]
    if lost:
        raise RenderError(f"it leaves out or alters the text of a message from {lost[0]}")


class _InconsistentError(Exception):
    def __str__(self) -> str:
        return (
            "it writes earlier messages differently once later ones follow, so what a model is asked to "
            "continue would not be what it was trained on. Give chat_template another name or file."
        )


def _parse_tools(tools: str) -> Any:
    try:
        return json.loads(tools)
    except (ValueError, RecursionError):
        return tools
