"""Templates that choose among others: what a model has for each kind of conversation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from finetune.data.reading.conversation import Conversation
from finetune.data.templates.pieces import Piece, Template
from finetune.errors import UserError
from finetune.families.family import find_family
from finetune.families.multimodal.text_part import text_part
from finetune.storage.files import read_json_or_empty
from finetune.tokenizers.added_tokens import read_folder_tokens


class DefaultTemplate:
    """Writes conversations as the model's own template does, and pairs of ``src`` and ``tgt`` as plain text.

    PaddleNLP trains pairs without a template, except where its own file `chat_template.json` stands in the folder.
    The template is loaded when the first conversation asks for it, so that a faulty one hinders nobody else.

    Args:
        load: Loads the model's own template.
        plain: Writes texts as they are.
        takes_pairs: Whether pairs are written by the model's own template too.
    """

    appends_eos = True
    special_tokens: tuple[str, ...] = ()

    def __init__(self, load: Callable[[], Template], plain: Template, *, takes_pairs: bool):
        self._load, self._plain, self._takes_pairs = functools.cache(load), plain, takes_pairs

    def uses_own(self, conversation: Conversation) -> bool:
        """Whether the model's own template writes a conversation."""
        return not conversation.is_text and (self._takes_pairs or not conversation.is_pair)

    def choose(self, conversation: Conversation) -> Template:
        """The template that writes a conversation."""
        return self._load() if self.uses_own(conversation) else self._plain

    def render(self, conversation: Conversation) -> list[Piece]:
        """All pieces of a conversation, for training."""
        return self.choose(conversation).render(conversation)

    def render_prompt(self, conversation: Conversation) -> list[Piece]:
        """What stands before the last answer."""
        return self.choose(conversation).render_prompt(conversation)


def family_format(folder: Path) -> str | None:
    """Name of the format that the family of a model in a folder is trained with; None where nothing tells one."""
    config = read_json_or_empty(folder / "config.json")
    try:
        return choose_format(find_family(text_part(config), folder).chat_template, folder) if config else None
    except UserError:  # told where the model is loaded
        return None


def choose_format(known: str | Mapping[str, str] | None, folder: Path) -> str | None:
    """The name of a format out of what a family's record says, by the tokens of the tokenizer in a folder."""
    if known is None or isinstance(known, str):
        return known
    tokens = read_folder_tokens(folder).tokens
    return next((name for token, name in known.items() if token in tokens), None)


class TemplateByTools:
    """Writes conversations that offer functions by another template than the rest, as transformers does.

    Args:
        load_tool_use: Loads the model's template "tool_use", when the first conversation asks for it.
        default: Writes the others.
    """

    special_tokens: tuple[str, ...] = ()

    def __init__(self, load_tool_use: Callable[[], Template], default: Template):
        self._load, self._default = functools.cache(load_tool_use), default
        self.appends_eos = default.appends_eos

    def choose(self, conversation: Conversation) -> Template:
        """The template that writes a conversation."""
        return self._load() if conversation.tools else self._default

    def render(self, conversation: Conversation) -> list[Piece]:
        """All pieces of a conversation, for training."""
        return self.choose(conversation).render(conversation)

    def render_prompt(self, conversation: Conversation) -> list[Piece]:
        """What stands before the last answer."""
        return self.choose(conversation).render_prompt(conversation)
