"""From a conversation to text pieces, each with a flag that says whether it is learned.

A template decides on text and on the flag alone. Token ids, truncation, and the framing tokens of the
tokenizer belong to `finetune.data.samples.tokenize`.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from finetune.data.reading.conversation import Conversation
from finetune.data.templates.chat_templates import CHAT_FORMATS, NamedTemplate
from finetune.data.templates.default_template import DefaultTemplate, TemplateByTools, family_format
from finetune.data.templates.jinja_forms import JINJA_FORMS, SWITCH
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.json_templates import PARTS, JsonTemplate
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
from finetune.data.templates.pieces import Piece, Template
from finetune.errors import UserError
from finetune.storage.files import is_present, read_json_object, read_json_or_empty, read_text
from finetune.storage.template_files import NAMED_FOLDER, named_files
from finetune.tokenizers.added_tokens import read_folder_tokens

__all__ = ["JsonTemplate", "Piece", "PlainTemplate", "Template", "load_template"]

PLAIN_NAMES = ("none", "plain")
OWN_NAME = "tokenizer"

FORM_NAMES = (*CHAT_FORMATS, *JINJA_FORMS)
_SWITCHED = tuple(name for name, form in JINJA_FORMS.items() if form.has_switch)
_OWN_FILES = ("chat_template.json", JINJA_FILE, CONFIG_FILE)
_JSON_REMEDY = f"put the keys {', '.join(PARTS)} there, or give chat_template another name or file"
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


def load_template(
    name_or_path: str | Path | None,
    tokenizer_folder: str | Path | None = None,
    *,
    enable_thinking: bool | None = None,
) -> Template:
    """The template that the setting ``chat_template`` asks for.

    Args:
        name_or_path: None for the default: the template in the tokenizer's folder for conversations, or that of
            the family, see `DefaultTemplate`; "none" or "plain" for no template at all; a key of `CHAT_FORMATS` or
            `JINJA_FORMS`; "tokenizer" for the one in the tokenizer's folder; the name of one of several in that
            folder; otherwise the path of a file (JSON of the shape of `JsonTemplate`, or with a key
            ``chat_template`` that holds jinja text, or jinja by its name), or of a folder that holds one of these
            as a tokenizer's folder does.
        tokenizer_folder: Where "tokenizer" and relative paths are looked for, and the names of special
            tokens.
        enable_thinking: What the template is told of thoughts before answers; None: nothing.

    Raises:
        UserError: The value is none of these, the file is faulty, or has no place for what is told of thoughts.
    """
    name = None if name_or_path is None else str(name_or_path)
    folder = Path(tokenizer_folder) if tokenizer_folder is not None else None
    return _Loader(folder, enable_thinking).load(name)


class _Loader:
    """Loads templates.

    Args:
        folder: The tokenizer's.
        enable_thinking: As for `load_template`.
    """

    def __init__(self, folder: Path | None, enable_thinking: bool | None):
        self._folder = folder
        self._values = {} if enable_thinking is None else {SWITCH: enable_thinking}

    def load(self, name: str | None) -> Template:
        """The template of a name, or that of a file."""
        folder = self._folder
        if name is None:
            return self._load_default(folder)
        if name in JINJA_FORMS:
            if not JINJA_FORMS[name].has_switch:
                self._refuse_switch(name)
            return self._make(JINJA_FORMS[name].source, name, folder, marks=JINJA_FORMS[name].special_tokens)
        if name in PLAIN_NAMES or name in CHAT_FORMATS:
            self._refuse_switch(name)
            tokens = _read_special_tokens(folder)[1:] if folder and name in CHAT_FORMATS else ([], [])
            return PlainTemplate() if name in PLAIN_NAMES else NamedTemplate(name, (*tokens[0], *tokens[1]))
        if name == OWN_NAME:
            return self._load_own(folder)
        if folder and folder.is_dir() and (named := self._load_named(name, folder)):
            return named
        for path in (Path(name), *([folder / name] if folder else [])):
            if path.is_dir():
                return self._load_own(path, f"chat_template is the folder {path}, which")
            if path.is_file() or (path.suffix in (".json", *_JINJA_SUFFIXES) and is_present(path)):
                template = self._load_file(path, folder)
                if template is None:
                    raise UserError(f"chat_template: {path} holds no chat_template.")
                return template
        raise _unknown(name, folder)

    def _load_default(self, folder: Path | None) -> Template:
        if folder is None or not has_own_template(folder):
            if folder is None or (name := family_format(folder)) is None:
                self._refuse_switch("none")
                return PlainTemplate(is_for_want_of_another=True)
            return DefaultTemplate(lambda: self.load(name), PlainTemplate(), takes_pairs=False)

        def load() -> Template:
            try:
                return self._load_own(folder)
            except UserError as error:
                hint = "this is the model's own template, the default for conversations: set chat_template to none for "
                raise UserError([*error.faults, f"{hint}plain text, or to another name or file"]) from None

        return DefaultTemplate(load, PlainTemplate(), takes_pairs=is_present(folder / _OWN_FILES[0]))

    def _load_own(self, folder: Path | None, what: str = "") -> Template:
        if (
            folder
            and (folder / _OWN_FILES[0]).is_file()
            and (template := self._load_file(folder / _OWN_FILES[0], folder))
        ):
            return template
        own = read_own_templates(folder) if folder else None
        if own and own.by_name:
            return self._choose_default(own, own.place.parent)
        raise UserError(
            f"{what or f'chat_template is tokenizer, but {folder}'} has none (looked for {', '.join(_OWN_FILES)}, "
            f"{NAMED_FOLDER}/): choose one of {', '.join(FORM_NAMES)}, or give a file."
        )

    def _load_named(self, name: str, folder: Path) -> Template | None:
        """The template that a folder has under a name; None where it has none."""
        own = read_own_templates(folder)
        if name not in own.by_name:
            return None
        return self._make(own.by_name[name], f"{own.place}: {name}", folder, needs_tools=name == TOOL_USE)

    def _load_file(self, path: Path, folder: Path | None) -> Template | None:
        """The template in a file; None for JSON of a tokenizer that has none."""
        folder = folder or path.parent
        if path.suffix in _JINJA_SUFFIXES:
            source = read_text(path, remedy=REMEDY)
            return self._make(source, str(path), folder)
        parts = read_json_object(path, remedy=_JSON_REMEDY)
        if "chat_template" not in parts:
            if path.name == CONFIG_FILE:
                return None
            self._refuse_switch(str(path))
            return JsonTemplate(parts, str(path))
        found = read_template_field(path, parts)
        return self._choose_default(OwnTemplates(path, found), folder) if found else None

    def _choose_default(self, own: OwnTemplates, folder: Path) -> Template:
        """What writes conversations where no template is named: as in transformers, "tool_use" those with tools.

        Raises:
            UserError: There are templates with names, and none of them is the default one.
        """
        if DEFAULT not in own.by_name:
            raise UserError(
                f"chat_template: {own.place} holds no default template; set chat_template to one of its names: "
                f"{', '.join(own.by_name)}."
            )
        default = self._make(own.by_name[DEFAULT], str(own.place), folder)
        if TOOL_USE not in own.by_name:
            return default

        def load_tool_use() -> Template:
            return self._make(own.by_name[TOOL_USE], f"{own.place}: {TOOL_USE}", folder, needs_tools=True)

        return TemplateByTools(load_tool_use, default)

    def _make(
        self,
        source: str,
        name: str,
        folder: Path | None,
        *,
        marks: tuple[str, ...] = (),
        needs_tools: bool = False,
    ) -> Template:
        """A template of jinja text; the marks are special tokens that the tokenizer must have."""
        if SWITCH not in source:
            self._refuse_switch(name)
        by_role, special, other = _read_special_tokens(folder) if folder else ({}, [], [])
        try:
            template = JinjaTemplate(
                source, name, by_role, (*special, *marks), other, needs_tools=needs_tools, values=self._values
            )
        except UserError as error:
            stand_ins = [
                f"chat_template {form} writes the same prompts and can be trained"
                for form, known in JINJA_FORMS.items()
                if known.stands_in and all(mark in source for mark in known.special_tokens)
            ]
            raise UserError([*error.faults, *stand_ins]) from None
        template.special_tokens = marks
        return template

    def _refuse_switch(self, name: str) -> None:
        if self._values:
            raise UserError(
                f"{SWITCH} is set, but the chat template {name!r} has no place for it: leave {SWITCH} out, or set "
                f"chat_template to one that has, such as {', '.join(_SWITCHED)}"
            )


def _unknown(name: str, folder: Path | None) -> UserError:
    """The refusal of a name, with those that are near to it."""
    nearest = get_close_matches(name.lower(), [*FORM_NAMES, OWN_NAME], n=3, cutoff=0.5)
    meant = f" (did you mean {' or '.join(map(repr, nearest))}?)" if nearest else ""
    own = read_own_templates(folder).by_name if folder else {}
    listed = f": {', '.join(own)}" if len(own) > 1 else ""
    return UserError(
        f"chat_template: {name!r} is not known{meant}. "
        f"Accepted: null (the model's own for conversations), {', '.join(map(repr, PLAIN_NAMES))} (no template), "
        f"{', '.join(FORM_NAMES)}, {OWN_NAME!r} (the tokenizer's own{listed}), or the path of a jinja file or of a "
        'JSON file such as {"system": "...", "conversation": ["{{user}} ...", "{{bot}} ..."], "query": "{{query}} ..."}.'
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
    if name in JINJA_FORMS:
        return "strftime_now" in JINJA_FORMS[name].source and JINJA_FORMS[name].values.get("date") is None
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


def _read_special_tokens(folder: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Special tokens by role, all of them, and other added tokens, out of the files that stand beside a tokenizer."""
    found = read_folder_tokens(folder)
    by_role = {"bos_token": "", "eos_token": ""} | dict(found.roles)
    special = [name for name, token in found.tokens.items() if name.strip() and token.special]
    other = [name for name, token in found.tokens.items() if name.strip() and not token.special]
    return by_role, special, other
