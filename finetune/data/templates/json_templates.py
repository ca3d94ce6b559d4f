"""PaddleNLP's ``chat_template.json``: parts of jinja text that are filled round by round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from finetune.data.reading.conversation import Conversation, make_conversation
from finetune.data.templates.jinja_environment import PART
from finetune.data.templates.pieces import Piece, RefusedConversationError
from finetune.data.templates.template_rendering import Renderer, RenderError, SourceError
from finetune.errors import UserError

PARTS = ("system", "conversation", "query")


class JsonTemplate:
    """PaddleNLP's ``chat_template.json``: jinja text for the system part, a round, and the last query.

    The parts see ``is_training`` and, where the example has one, ``system``; a round also sees ``user``,
    ``bot``, ``index`` (from 0), ``length`` (number of rounds), ``is_first`` and ``is_last``; the query
    sees ``query`` in place of ``user`` and ``bot``. Without a query part the user part of a round serves.
    The second half of a round is learned, and closed by the end-of-sequence token where the template puts
    nothing but white space behind ``bot``. Names of special tokens in the file stand for these tokens.

    Args:
        parts: The parsed file: ``conversation`` is a list of two jinja strings; ``system`` and ``query``
            are optional.
        name: What to call it in messages, usually the path.

    Raises:
        UserError: Parts are missing, unknown, of the wrong type, or no valid jinja; all of them at once.
    """

    special_tokens: tuple[str, ...] = ()  # a name that the tokenizer lacks is written as text
    mixes_text = True  # special pieces hold names and text

    def __init__(self, parts: Mapping[str, Any], name: str):
        self._name = name
        _check_parts(parts, name)
        sources = {"user": parts["conversation"][0], "bot": parts["conversation"][1]}
        sources |= {key: parts[key] for key in ("system", "query") if parts.get(key) is not None}
        self._parts: dict[str, Renderer] = {}
        faults = []
        for part, source in sources.items():
            try:
                self._parts[part] = Renderer(source, f"{name}: {part} part", PART)
            except SourceError as error:
                faults.append(f"{name}: the {part} part is no valid jinja ({error}).")
        if faults:
            raise UserError(faults)
        self.appends_eos = self._ends_with_response()

    def render(self, conversation: Conversation) -> list[Piece]:
        """System part, then both halves of every round."""
        pieces = self._render_system(conversation, is_training=True)
        for index in range(len(conversation.turns)):
            pieces += self._render_round(conversation, index, is_training=True)
        return pieces

    def render_prompt(self, conversation: Conversation) -> list[Piece]:
        """System part, the rounds before the last, and the last prompt as query."""
        pieces = self._render_system(conversation, is_training=False)
        last = len(conversation.turns) - 1
        for index in range(last):
            pieces += self._render_round(conversation, index, is_training=False)
        prompt = conversation.turns[last].prompt
        part, values = ("query", {"query": prompt}) if "query" in self._parts else ("user", {"user": prompt})
        values |= _round_context(conversation, last, is_training=False)
        text = self._render_part(part, values, conversation)
        return [*pieces, Piece(text, learned=False, special=True, data=prompt)]

    def _render_system(self, conversation: Conversation, *, is_training: bool) -> list[Piece]:
        if "system" not in self._parts:
            return []
        context = _context(conversation, is_training=is_training)
        text = self._render_part("system", context, conversation)
        return [Piece(text, learned=False, special=True, data=conversation.system_text())] if text else []

    def _render_round(self, conversation: Conversation, index: int, *, is_training: bool) -> list[Piece]:
        turn = conversation.turns[index]
        values = _round_context(conversation, index, is_training=is_training)
        values |= {"user": turn.prompt, "bot": turn.response}
        user, bot = (self._render_part(part, values, conversation) for part in ("user", "bot"))
        return [
            Piece(user, learned=False, special=True, data=turn.prompt),
            Piece(bot, learned=True, special=True, data=turn.response),
        ]

    def _render_part(self, part: str, values: Mapping[str, Any], conversation: Conversation) -> str:
        try:
            return self._parts[part].render(values)
        except RenderError as error:
            where = conversation.place if conversation.line_number else "a trial round"
            raise RefusedConversationError(
                f"{self._name}: the {part} part fails on {where}: {error}."
            ) from error

    def _ends_with_response(self) -> bool:
        """Whether the learned half of a round puts no end mark behind the response."""
        probe = make_conversation([("question", "response")])
        rendered = self._render_round(probe, 0, is_training=True)[1].text
        return not rendered.rpartition("response")[2].strip()


def _check_parts(parts: Mapping[str, Any], name: str) -> None:
    faults = [
        f"{name}: unknown key {key!r}, allowed: {', '.join(PARTS)}." for key in parts if key not in PARTS
    ]
    rounds = parts.get("conversation")
    if not (isinstance(rounds, list) and len(rounds) == 2 and all(isinstance(half, str) for half in rounds)):
        faults.append(
            f"{name}: conversation must be a list of two strings, the user part and the bot part, "
            f"such as ['{{{{user}}}}', '{{{{bot}}}}'], not {json.dumps(rounds, ensure_ascii=False)[:80]}."
        )
    for key in ("system", "query"):
        if not isinstance(parts.get(key, ""), str | None):
            faults.append(f"{name}: {key} must be a string or null.")
    if faults:
        raise UserError(faults)


def _context(conversation: Conversation, *, is_training: bool) -> dict[str, Any]:
    context: dict[str, Any] = {"is_training": is_training}
    if conversation.system is not None or conversation.tools:
        context["system"] = conversation.system_text()
    return context


def _round_context(conversation: Conversation, index: int, *, is_training: bool) -> dict[str, Any]:
    length = len(conversation.turns)
    position = {"index": index, "length": length, "is_first": index == 0, "is_last": index == length - 1}
    return _context(conversation, is_training=is_training) | position
