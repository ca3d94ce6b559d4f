"""Messages in the language of the person who reads them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.machine.command_names import name_as_called
from finetune.machine.language.catalogue import Catalogue
from finetune.machine.language.choice import language

MESSAGES_FILE = Path(__file__).with_name("messages_zh.json")
PIECES_FILE = Path(__file__).with_name("pieces_zh.json")


_MAX_KEPT = 1000
_kept: set[str] = set()
_HIDDEN = re.compile("\ue000(\\d+)\ue001")
"""What stands for a kept text while a message is looked up: characters for private use, which no message has."""


def keep_values(*values: Any) -> None:
    """Has what a person gave, such as names of files, stay as it is inside messages, even if it looks like one.

    Args:
        values: Texts, or lists and mappings of them; anything else has nothing to translate.
    """
    if language() == "en":
        return
    for value in values:
        if isinstance(value, Mapping):
            keep_values(*value, *value.values())
        elif isinstance(value, list | tuple):
            keep_values(*value)
        elif isinstance(value, str) and len(value) <= _MAX_KEPT:
            _kept.update(text for each in (value, *value.split(",")) if (text := each.strip()))


def translate(text: str) -> str:
    """What is about to be shown, in the person's language, with commands called as the person called this one."""
    return name_as_called(text if language() == "en" else _translate_around_kept(text, chinese().translate))


def translate_piece(text: str) -> str:
    """The same for what stands in a column, a title or a label."""
    return name_as_called(
        text if language() == "en" else _translate_around_kept(text, chinese().translate_piece)
    )


def _translate_around_kept(text: str, translated: Callable[[str], str]) -> str:
    """Hides kept texts of several words, in which parts of messages could be found."""
    kept = [each for each in sorted(_kept, key=len, reverse=True) if " " in each and each in text]
    if not kept:
        return translated(text)
    shown = []
    for times in (-1, 1):  # at its first place alone, where the message has the same words of its own
        hidden = text
        for number, each in enumerate(kept):
            hidden = hidden.replace(each, f"\ue000{number}\ue001", times)
        shown.append(_HIDDEN.sub(lambda place: kept[int(place[1])], translated(hidden)))
    return min(shown, key=lambda each: sum(letter.isascii() for letter in each))  # what was translated most


@functools.cache
def chinese() -> Catalogue:
    """The catalogue of Chinese messages."""
    # English starts read nothing of it.
    messages, pieces = (json.loads(path.read_text(encoding="utf-8")) for path in (MESSAGES_FILE, PIECES_FILE))
    return Catalogue(messages, pieces, _kept)
