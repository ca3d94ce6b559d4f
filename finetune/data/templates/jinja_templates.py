"""Jinja templates in the style of Hugging Face: one text that writes a whole list of messages.

`message_slots` says what is learned of it. The messages' texts are not rendered: placeholders are, and the text around
them shows what is the template's own. So no text of an example can become a special token, and the result depends on
the roles alone and is remembered. Where a template may do something to a text (`text_conditions`), such as trim it,
conversations that have such texts are rendered as they are, one by one, with names of special tokens written
otherwise; what the template makes of a prompt is taken as it is, and an answer may lose or gain blanks only.
What a template writes from an object, the functions on offer and the calls of them, is always rendered as it is.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.data.reading.conversation import ASSISTANT, TOOL, TOOL_CALL, USER, Conversation, Message
from finetune.data.templates.answer_texts import AlteredError, check_answers
from finetune.data.templates.jinja_environment import CHAT
from finetune.data.templates.jinja_forms import SWITCH
from finetune.data.templates.message_outlines import Outline, write_message
from finetune.data.templates.message_slots import InconsistentError, SlotFinder, Slots, find_closing
from finetune.data.templates.pieces import (
    Piece,
    PieceWriter,
    RefusedConversationError,
    RewrittenConversationError,
)
from finetune.data.templates.template_rendering import Renderer, RenderError, SourceError
from finetune.data.templates.text_conditions import find_conditions
from finetune.data.templates.tool_calls import split_calls
from finetune.errors import UserError

_MAX_REMEMBERED = 4096
_TOKEN_LIKE = re.compile(r"<\|[^|<>\s]+\|>|</?s>|<(?:start|end)_of_turn>|<[be]os>")
_TOOL_NAMES = re.compile(r"tool_call_id|\bm(?:e?ss?a?ge?)?(?:\.name\b|\[['\"]name['\"]\])")
_TRIED_ID = "call00001"  # Mistral's templates ask for nine letters or digits
_SYSTEM = "system"
_TRIAL_LETTERS = "aB c D\u00e9 1"
_ANSWERS = (ASSISTANT, TOOL_CALL)
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
        other_tokens: Texts of tokens that are no special ones, and are met in data as well.
        needs_tools: Whether it is meant for conversations that offer functions, and may fail without any.
        values: What it is told besides, such as ``enable_thinking``.

    Attributes:
        takes_reasoning: Whether it has a place for the thoughts of answers.
        takes_tool_names: Whether it has one for the names of tools, or the ids of their calls, beside results.

    Raises:
        UserError: No valid jinja, or it does not write conversations in a way that can be learned from.
    """

    def __init__(
        self,
        source: str,
        name: str,
        tokens: Mapping[str, str],
        special_tokens: Sequence[str] = (),
        other_tokens: Sequence[str] = (),
        *,
        needs_tools: bool = False,
        values: Mapping[str, Any] | None = None,
    ):
        self.name = self._name = name
        self._switch = (values or {}).get(SWITCH)
        self._tried_tools = _TRIED_TOOLS if needs_tools else None
        try:
            renderer = Renderer(source, name, CHAT)
        except SourceError as error:
            raise UserError(f"{name}: no valid jinja ({error}).") from None
        found = {*_TOKEN_LIKE.findall(source), *tokens.values(), *special_tokens} - {"", *other_tokens}
        self._specials = tuple(sorted(found))
        self._conditions = find_conditions(renderer.tree)
        sought = self._conditions.parts - set(tokens.values())  # transformers finds these names in texts
        self._finder = SlotFinder(
            source,
            renderer,
            values={**tokens, **(values or {})},
            specials=sorted({*found, *other_tokens}),
            escaped=sorted(found - sought),
            places_texts=not self._conditions.is_opaque,
        )
        self._takes_tools = "tools" in source
        self.takes_reasoning = "reasoning_content" in source
        self.takes_tool_names = _TOOL_NAMES.search(source) is not None
        self.special_tokens: tuple[str, ...] = ()  # a name that the tokenizer lacks is written as text
        self._remembered = functools.lru_cache(maxsize=_MAX_REMEMBERED)(self._find_slots)
        self._takes_empty_system = self._find_default_system()
        self._takes_calls = "tool_calls" in source and self._writes_calls("")
        self._takes_calls_with_ids = "tool_calls" in source and self._writes_calls(_TRIED_ID)
        self.appends_eos = not self._has_end_mark()
        if self._changes_letters():
            raise UserError(
                f"{self._name}: changes the text of answers, so that a model would learn another one. Give chat_template "
                "another name or file."
            )

    def render(self, conversation: Conversation) -> list[Piece]:
        """Every message, the answers learned."""
        return self._write(conversation, for_training=True)

    def render_last(self, conversation: Conversation) -> list[Piece]:
        """Every message, the last answer learned: earlier ones are written as they are when this one is asked for."""
        return self._write(conversation, for_training=True, only_last=True)

    def render_prompt(self, conversation: Conversation) -> list[Piece]:
        """What stands before the last answer."""
        return self._write(conversation, for_training=False)

    def _write(
        self, conversation: Conversation, *, for_training: bool, only_last: bool = False
    ) -> list[Piece]:
        messages = [self._describe(message) for message in conversation.messages]
        tools = conversation.tools if self._takes_tools else None
        system = conversation.system if tools else conversation.system_text()
        if system or (conversation.system == "" and self._takes_empty_system):
            messages.insert(0, (Outline(_SYSTEM), system or "", ""))
        outlines = tuple(outline for outline, _, _ in messages)
        texts = [text for _, text, _ in messages] + [reasoning for _, _, reasoning in messages]
        try:
            self._refuse_token_names("tools", tools)
            for outline in outlines:
                self._refuse_token_names("calls of functions", outline.calls)
                self._refuse_token_names("names of tools", f"{outline.tool} {outline.call_id}")
            seen = outlines[: None if for_training else -1]
            if all(map(self._conditions.hold, _written_texts(seen, texts, len(outlines)))):
                slots = self._remembered(outlines, tools, for_training, only_last)
            else:
                slots = self._render_texts(
                    outlines, tools, texts, for_training=for_training, only_last=only_last
                )
        except RenderError as error:
            raise RefusedConversationError(f"{self._name}: fails on {conversation.place}: {error}.") from None
        except (InconsistentError, AlteredError) as error:
            if (
                not for_training and not only_last
            ):  # a model is asked with earlier answers as they are written now
                return self._write(conversation, for_training=False, only_last=True)
            is_rewritten = isinstance(error, InconsistentError) and not only_last
            kind = RewrittenConversationError if is_rewritten else RefusedConversationError
            reason = str(error) if is_rewritten else self._describe_mismatch(error)
            raise kind(f"{self._name}: cannot be used for {conversation.place}: {reason}") from None
        writer = PieceWriter()
        for slot, learned in slots:
            text = texts[int(slot.value)] if slot.kind == "data" else slot.value
            writer.write(slot.kind, text, learned=learned)
        return writer.finish()

    def _describe_mismatch(self, error: Exception) -> str:
        """Why an answer cannot be learned behind the text that asks for it."""
        if not isinstance(error, InconsistentError):
            return str(error)
        if self._switch is False:
            return (
                "the answer, once written, does not begin with the text that asks for it: it holds thoughts, and "
                f"{SWITCH} is false. Leave {SWITCH} out, or take the thoughts out."
            )
        return (
            "the answer, once written, does not begin with the text that asks for it. Give chat_template another name "
            "or file."
        )

    def _describe(self, message: Message) -> tuple[Outline, str, str]:
        """A message's outline, its text, and its thoughts."""
        text, calls = message.content, ""
        if message.role == TOOL_CALL and (
            self._takes_calls or (self._takes_calls_with_ids and message.call_id)
        ):
            text, calls = split_calls(text)
        reasoning = message.reasoning if self.takes_reasoning else ""
        takes_names = self.takes_tool_names or bool(calls)
        tool, call_id = (message.tool, message.call_id) if takes_names else ("", "")
        outline = Outline(message.role, calls, bool(text) or not calls, bool(reasoning), tool, call_id)
        return outline, text, reasoning

    def _refuse_token_names(self, what: str, text: str | None) -> None:
        """What the template renders itself of an example must not name special tokens."""
        named = [token for token in self._specials if token in (text or "")]
        if named:
            raise RenderError(f"its {what} contain {named[0]!r}, which is a special token")

    def _find_slots(
        self, outlines: tuple[Outline, ...], tools: str | None, for_training: bool, only_last: bool = False
    ) -> Slots:
        return self._finder.find(outlines, tools, for_training=for_training, only_last=only_last)

    def _render_texts(
        self,
        outlines: tuple[Outline, ...],
        tools: str | None,
        texts: Sequence[str],
        *,
        for_training: bool,
        only_last: bool,
    ) -> Slots:
        """The slots of a conversation whose texts the template is to see.

        Raises:
            InconsistentError: What comes later changes what was written for earlier messages.
            RenderError: The template fails, or leaves a message out.
            AlteredError: It changes an answer.
        """
        with contextlib.suppress(InconsistentError):  # where messages of these roles are left out, it is told
            self._remembered(outlines, tools, for_training, only_last)
        rendered = self._finder.find(
            outlines, tools, for_training=for_training, texts=texts, only_last=only_last
        )
        slots = tuple(
            (slot._replace(value=self._finder.unescape(slot.value)), learned) for slot, learned in rendered
        )
        answers = [
            text
            for outline, text in zip(outlines, texts, strict=False)
            if outline.role in _ANSWERS and outline.has_text
        ]
        if for_training:
            check_answers(slots, answers[-1:] if only_last else answers)
        return slots

    def _writes_calls(self, call_id: str) -> bool:
        """Whether the template writes calls of functions from objects, with this id; some ask for more than data have."""
        call = json.dumps([{"name": "x", "arguments": {"y": 1}}])
        roles = (USER, TOOL_CALL, TOOL, ASSISTANT)
        outlines = tuple(
            Outline(role, call, False, call_id=call_id)
            if role == TOOL_CALL
            else Outline(role, call_id=call_id if role == TOOL else "")
            for role in roles
        )
        try:
            self._find_slots(outlines, self._tried_tools, True)
        except (RenderError, InconsistentError):
            return False
        return True

    def _find_default_system(self) -> bool:
        """Whether an empty system text keeps the template from writing one of its own."""
        texts = []
        for roles in ((USER, ASSISTANT), (_SYSTEM, USER, ASSISTANT)):
            messages = [write_message(role, "" if role == _SYSTEM else "x") for role in roles]
            try:
                texts.append(next(self._finder.render(messages, self._tried_tools, [(len(roles), False)])))
            except RenderError:
                return False
        return len(texts[1]) < len(texts[0])

    def _changes_letters(self) -> bool:
        """Whether the template writes another text than an ordinary one for an answer, be it the last or not."""
        messages = [
            write_message(role, _TRIAL_LETTERS if role == ASSISTANT else "x")
            for role in (USER, ASSISTANT) * 2
        ]
        try:
            text = next(self._finder.render(messages, self._tried_tools, [(len(messages), False)]))
        except RenderError:
            return False  # it is told where it is of consequence
        return text.count(_TRIAL_LETTERS) != 2

    def _has_end_mark(self) -> bool:
        """Whether answers end with a special token; also refuses what cannot be learned from."""
        slots = self._try()
        learned = [slot for slot, is_learned in slots if is_learned]
        if learned[-1].kind != "special" and not self._finder.marks_learned:
            self._finder.closing = find_closing(slots)
            self._remembered.cache_clear()
        return learned[-1].kind == "special" or bool(self._finder.closing)

    def _try(self) -> Slots:
        """The slots of a trial conversation: of two rounds, or of one where a second changes the first."""
        for num_rounds in (2, 1):
            outlines = tuple(map(Outline, (USER, ASSISTANT) * num_rounds))
            try:
                return self._find_slots(outlines, self._tried_tools, True)
            except RenderError as error:
                raise UserError(f"{self._name}: fails on a trial conversation: {error}.") from None
            except InconsistentError as error:
                refusal = UserError(f"{self._name}: cannot be used for training: {error}")
        raise refusal


def _written_texts(outlines: Sequence[Outline], texts: Sequence[str], num_messages: int) -> Iterator[str]:
    """The texts that a template is given."""
    for index, outline in enumerate(outlines):
        if outline.has_text:
            yield texts[index]
        if outline.has_reasoning:
            yield texts[num_messages + index]
