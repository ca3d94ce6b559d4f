"""Messages in the language of the person who reads them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from finetune.machine.language.catalogue import Catalogue
from finetune.machine.language.choice import language

MESSAGES_FILE = Path(__file__).with_name("messages_zh.json")
PIECES_FILE = Path(__file__).with_name("pieces_zh.json")


def translate(text: str) -> str:
    """What is about to be shown, in the person's language; untouched in English."""
    return text if language() == "en" else chinese().translate(text)


def translate_piece(text: str) -> str:
    """The same for what stands in a column, a title or a label."""
    return text if language() == "en" else chinese().translate_piece(text)


@functools.cache
def chinese() -> Catalogue:
    """The catalogue of Chinese messages."""
    # English starts read nothing of it.
    messages, pieces = (json.loads(path.read_text(encoding="utf-8")) for path in (MESSAGES_FILE, PIECES_FILE))
    return Catalogue(messages, pieces)
