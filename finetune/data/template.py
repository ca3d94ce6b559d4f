"""From a conversation to text pieces, each with a flag that says whether it is learned.

A template decides on text and on the flag alone. Token ids, truncation, and the framing tokens of the
tokenizer belong to `finetune.data.tokenize`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.data.formats import Conversation, Turn
from finetune.errors import UserError

PLAIN_NAMES = ("none", "plain")

_PARTS = ("system", "conversation", "query")
# What a template that is valid but does not fit the data may raise while it is rendered.
_RENDER_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text that is tokenized on its own.

    Attributes:
        text: The text.
        learned: Whether its tokens carry a label.
        special: Whether names of special tokens in the text, such as ``</s>``, stand for these tokens.
        data: The part of a special piece that comes from the example: names in it are plain text, so
            that no example can end its own response or open another round.
    """

    text: str
    learned: bool
    special: bool = False
    data: str = ""


class Template(Protocol):
    """How the rounds of a conversation are written down.

    Attributes:
        appends_eos: Whether a learned response has to be closed by the end-of-sequence token; False
            when the template writes an end mark of its own.
    """

    appends_eos: bool

    def render(self, conversation: Conversation) -> list[Piece]:
        """All pieces of a conversation, in order, for training."""
        ...

    def render_prompt(self, conversation: Conversation) -> list[Piece]:
        """What stands before the last response, for generation; that response is not looked at."""
        ...


class PlainTemplate:
    """Prompt and response as they are, round after round, with nothing in between."""

    appends_eos = True

    def render(self, conversation: Conversation) -> list[Piece]:
        """Every response is learned, nothing else is."""
        pieces = [Piece(conversation.system, learned=False)] if conversation.system else []
        for turn in conversation.turns:
            pieces += [Piece(turn.prompt, learned=False), Piece(turn.response, learned=True)]
        return pieces

    def render_prompt(self, conversation: Conversation) -> list[Piece]:
        """The same without the last response."""
        return self.render(conversation)[:-1]


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

    def __init__(self, parts: Mapping[str, Any], name: str):
        self._name = name
        _check_parts(parts, name)
        environment = _make_environment()
        sources = {"user": parts["conversation"][0], "bot": parts["conversation"][1]}
        sources |= {key: parts[key] for key in ("system", "query") if parts.get(key) is not None}
        self._parts: dict[str, jinja2.Template] = {}
        faults = []
        for part, source in sources.items():
            try:
                self._parts[part] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                faults.append(
                    f"{name}: the {part} part is no valid jinja (line {error.lineno}: {error.message})."
                )
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
        return [Piece(text, learned=False, special=True, data=conversation.system or "")] if text else []

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
        except _RENDER_ERRORS as error:
            line_number = conversation.line_number
            where = f"{conversation.file}:{line_number}" if line_number else "a trial round"
            raise UserError(f"{self._name}: the {part} part fails on {where}: {error}.") from error

    def _ends_with_response(self) -> bool:
        """Whether the learned half of a round puts no end mark behind the response."""
        probe = Conversation((Turn("question", "response"),), None, Path(self._name), 0)
        rendered = self._render_round(probe, 0, is_training=True)[1].text
        return not rendered.rpartition("response")[2].strip()


def load_template(name_or_path: str | Path | None, tokenizer_folder: str | Path | None = None) -> Template:
    """The template that the setting ``chat_template`` asks for.

    Args:
        name_or_path: None, "none" or "plain" for no template at all; otherwise the path of a file of the
            shape of `JsonTemplate`.
        tokenizer_folder: A second place to look for a relative path.

    Raises:
        UserError: The value is neither, or the file is faulty.
    """
    if name_or_path is None or str(name_or_path) in PLAIN_NAMES:
        return PlainTemplate()
    candidates = [Path(name_or_path)]
    if tokenizer_folder is not None:
        candidates.append(Path(tokenizer_folder) / name_or_path)
    for path in candidates:
        if path.is_file():
            return JsonTemplate(_read_parts(path), str(path))
    raise UserError(
        f"chat_template: {str(name_or_path)!r} is not known. Accepted: null, "
        f"{', '.join(map(repr, PLAIN_NAMES))} (no template), or the path of a JSON file such as "
        '{"system": "...", "conversation": ["{{user}} ...", "{{bot}} ..."], "query": "{{query}} ..."}.'
    )


def _read_parts(path: Path) -> Mapping[str, Any]:
    try:
        parts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"chat_template: {path} cannot be read as JSON: {error}.") from None
    if not isinstance(parts, dict):
        raise UserError(f"chat_template: {path} holds no JSON object, expected the keys {', '.join(_PARTS)}.")
    return parts


def _check_parts(parts: Mapping[str, Any], name: str) -> None:
    faults = [
        f"{name}: unknown key {key!r}, allowed: {', '.join(_PARTS)}." for key in parts if key not in _PARTS
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


def _make_environment() -> ImmutableSandboxedEnvironment:
    """A template file comes with a downloaded model: it may format text and nothing more."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    return environment


def _context(conversation: Conversation, *, is_training: bool) -> dict[str, Any]:
    context: dict[str, Any] = {"is_training": is_training}
    if conversation.system is not None:
        context["system"] = conversation.system
    return context


def _round_context(conversation: Conversation, index: int, *, is_training: bool) -> dict[str, Any]:
    length = len(conversation.turns)
    position = {"index": index, "length": length, "is_first": index == 0, "is_last": index == length - 1}
    return _context(conversation, is_training=is_training) | position
