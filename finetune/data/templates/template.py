"""From a conversation to text pieces, each with a flag that says whether it is learned.

A template decides on text and on the flag alone. Token ids, truncation, and the framing tokens of the
tokenizer belong to `finetune.data.samples.tokenize`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from finetune.data.reading.conversation import Conversation, make_conversation
from finetune.data.templates.chat_templates import CHAT_FORMATS, NamedTemplate
from finetune.data.templates.default_template import DefaultTemplate, TemplateByTools, family_format
from finetune.data.templates.jinja_environment import PART
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.own_templates import (
    CONFIG_FILE,
    DEFAULT,
    JINJA_FILE,
    REMEDY,
    TOOL_USE,
    OwnTemplates,
    read_own_templates,
    read_template_field,
)
from finetune.data.templates.pieces import Piece, RefusedConversationError, Template
from finetune.data.templates.template_rendering import Renderer, RenderError, SourceError
from finetune.errors import UserError
from finetune.storage.files import is_present, read_json_object, read_json_or_empty, read_text
from finetune.storage.template_files import NAMED_FOLDER, named_files
from finetune.tokenizers.added_tokens import read_folder_tokens

__all__ = ["JsonTemplate", "Piece", "PlainTemplate", "Template", "load_template"]

PLAIN_NAMES = ("none", "plain")
OWN_NAME = "tokenizer"

_PARTS = ("system", "conversation", "query")
_OWN_FILES = ("chat_template.json", JINJA_FILE, CONFIG_FILE)
_JSON_REMEDY = f"put the keys {', '.join(_PARTS)} there, or give chat_template another name or file"
_JINJA_SUFFIXES = (".jinja", ".jinja2", ".j2")


class PlainTemplate:
    """Prompt and response as they are, round after round, with nothing in between.

    Args:
        is_for_want_of_another: Whether nobody asked for it: none is set, and the model has none.
    """

    appends_eos = True
    special_tokens: tuple[str, ...] = ()

    def __init__(self, *, is_for_want_of_another: bool = False):
        self.is_for_want_of_another = is_for_want_of_another

    def render(self, conversation: Conversation) -> list[Piece]:
        """Every response is learned, nothing else is."""
        system = conversation.system_text()
        pieces = [Piece(system, learned=False)] if system else []
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


def load_template(name_or_path: str | Path | None, tokenizer_folder: str | Path | None = None) -> Template:
    """The template that the setting ``chat_template`` asks for.

    Args:
        name_or_path: None for the default: the template in the tokenizer's folder for conversations, or that of
            the family, see `DefaultTemplate`; "none" or "plain" for no template at all; a key of `CHAT_FORMATS`;
            "tokenizer" for the one in the tokenizer's folder; the name of one of several in that folder; otherwise the path of a file (JSON of the shape of
            `JsonTemplate`, or with a key ``chat_template`` that holds jinja text, or jinja by its name), or of a
            folder that holds one of these as a tokenizer's folder does.
        tokenizer_folder: Where "tokenizer" and relative paths are looked for, and the names of special
            tokens.

    Raises:
        UserError: The value is none of these, or the file is faulty.
    """
    name = None if name_or_path is None else str(name_or_path)
    folder = Path(tokenizer_folder) if tokenizer_folder is not None else None
    if name is None:
        return _load_default(folder)
    if name in PLAIN_NAMES:
        return PlainTemplate()
    if name in CHAT_FORMATS:
        if folder is None:
            return NamedTemplate(name)
        _, special, other = _read_special_tokens(folder)
        return NamedTemplate(name, (*special, *other))
    if name == OWN_NAME:
        return _load_own(folder)
    if folder and folder.is_dir() and (named := _load_named(name, folder)):
        return named
    for path in (Path(name), *([folder / name] if folder else [])):
        if path.is_dir():
            return _load_own(path, f"chat_template is the folder {path}, which")
        if path.is_file() or (path.suffix in (".json", *_JINJA_SUFFIXES) and is_present(path)):
            template = _load_file(path, folder)
            if template is None:
                raise UserError(f"chat_template: {path} holds no chat_template.")
            return template
    nearest = get_close_matches(name.lower(), [*CHAT_FORMATS, OWN_NAME], n=1)
    own = read_own_templates(folder).by_name if folder else {}
    raise UserError(
        f"chat_template: {name!r} is not known{f' (did you mean {nearest[0]!r}?)' if nearest else ''}. "
        f"Accepted: null (the model's own for conversations), {', '.join(map(repr, PLAIN_NAMES))} (no template), "
        f"{', '.join(CHAT_FORMATS)}, "
        f"{OWN_NAME!r} (the tokenizer's own{': ' if len(own) > 1 else ''}{', '.join(own) if len(own) > 1 else ''}), or the path of a jinja file or of a JSON file such as "
        '{"system": "...", "conversation": ["{{user}} ...", "{{bot}} ..."], "query": "{{query}} ..."}.'
    )


def has_own_template(folder: Path) -> bool:
    """Whether a tokenizer's folder has a template, be it a good one or not."""
    if any(is_present(folder / name) for name in _OWN_FILES[:-1]) or named_files(folder):
        return True
    return bool(read_json_or_empty(folder / _OWN_FILES[-1]).get("chat_template"))


def asks_for_time(name_or_path: str | None, folder: Path) -> bool:
    """Whether a template that `load_template` would give may write the date."""
    name = OWN_NAME if name_or_path is None else name_or_path
    if name in PLAIN_NAMES or name in CHAT_FORMATS:
        return False
    try:
        own = read_own_templates(folder).by_name
        if name == OWN_NAME or name in own:
            texts = list(own.values()) if name == OWN_NAME else [own[name]]
        else:
            paths = (Path(name), folder / name)
            texts = [read_text(path) for path in paths if path.is_file()]
            for path in filter(Path.is_dir, paths):
                texts += read_own_templates(path).by_name.values()
    except UserError:  # told where a conversation asks for the template
        return False
    return any("strftime_now" in text for text in texts)


def _load_default(folder: Path | None) -> Template:
    if folder is None or not has_own_template(folder):
        if folder is None or (name := family_format(folder)) is None:
            return PlainTemplate(is_for_want_of_another=True)
        return DefaultTemplate(lambda: load_template(name, folder), PlainTemplate(), takes_pairs=False)

    def load() -> Template:
        try:
            return _load_own(folder)
        except UserError as error:
            hint = "this is the model's own template, the default for conversations: set chat_template to none for "
            raise UserError([*error.faults, f"{hint}plain text, or to another name or file"]) from None

    return DefaultTemplate(load, PlainTemplate(), takes_pairs=is_present(folder / _OWN_FILES[0]))


def _load_own(folder: Path | None, what: str = "") -> Template:
    if (
        folder
        and (folder / _OWN_FILES[0]).is_file()
        and (template := _load_file(folder / _OWN_FILES[0], folder))
    ):
        return template
    own = read_own_templates(folder) if folder else None
    if own and own.by_name:
        return _choose_default(own, own.place.parent)
    raise UserError(
        f"{what or f'chat_template is tokenizer, but {folder}'} has none (looked for {', '.join(_OWN_FILES)}, "
        f"{NAMED_FOLDER}/): choose one of {', '.join(CHAT_FORMATS)}, or give a file."
    )


def _load_named(name: str, folder: Path) -> Template | None:
    """The template that a folder has under a name; None where it has none."""
    own = read_own_templates(folder)
    if name not in own.by_name:
        return None
    tokens = _read_special_tokens(folder)
    return JinjaTemplate(own.by_name[name], f"{own.place}: {name}", *tokens, needs_tools=name == TOOL_USE)


def _load_file(path: Path, folder: Path | None) -> Template | None:
    """The template in a file; None for JSON of a tokenizer that has none."""
    folder = folder or path.parent
    if path.suffix in _JINJA_SUFFIXES:
        source = read_text(path, remedy=REMEDY)
        return JinjaTemplate(source, str(path), *_read_special_tokens(folder))
    parts = read_json_object(path, remedy=_JSON_REMEDY)
    if "chat_template" not in parts:
        return None if path.name == CONFIG_FILE else JsonTemplate(parts, str(path))
    found = read_template_field(path, parts)
    return _choose_default(OwnTemplates(path, found), folder) if found else None


def _choose_default(own: OwnTemplates, folder: Path) -> Template:
    """What writes conversations where no template is named: as in transformers, "tool_use" those with tools.

    Raises:
        UserError: There are templates with names, and none of them is the default one.
    """
    tokens = _read_special_tokens(folder)
    if DEFAULT not in own.by_name:
        raise UserError(
            f"chat_template: {own.place} holds no default template; set chat_template to one of its names: "
            f"{', '.join(own.by_name)}."
        )
    default = JinjaTemplate(own.by_name[DEFAULT], str(own.place), *tokens)
    if TOOL_USE not in own.by_name:
        return default

    def load_tool_use() -> Template:
        return JinjaTemplate(own.by_name[TOOL_USE], f"{own.place}: {TOOL_USE}", *tokens, needs_tools=True)

    return TemplateByTools(load_tool_use, default)


def _read_special_tokens(folder: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Special tokens by role, all of them, and other added tokens, out of the files that stand beside a tokenizer."""
    found = read_folder_tokens(folder)
    by_role = {"bos_token": "", "eos_token": ""} | dict(found.roles)
    special = [name for name, token in found.tokens.items() if name.strip() and token.special]
    other = [name for name, token in found.tokens.items() if name.strip() and not token.special]
    return by_role, special, other


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


def _context(conversation: Conversation, *, is_training: bool) -> dict[str, Any]:
    context: dict[str, Any] = {"is_training": is_training}
    if conversation.system is not None or conversation.tools:
        context["system"] = conversation.system_text()
    return context


def _round_context(conversation: Conversation, index: int, *, is_training: bool) -> dict[str, Any]:
    length = len(conversation.turns)
    position = {"index": index, "length": length, "is_first": index == 0, "is_last": index == length - 1}
    return _context(conversation, is_training=is_training) | position
