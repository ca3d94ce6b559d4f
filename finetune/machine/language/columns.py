"""Texts on a terminal, where a Chinese character takes two columns."""

from __future__ import annotations

import re
import unicodedata

_PIECES = re.compile(r"[^\s⺀-鿿豈-﫿︰-﹏！-｠]+|.", re.DOTALL)
"""What is never broken: words and paths; a Chinese character is a piece of its own."""
_NEVER_FIRST = frozenset("，。、；：！？）》」』”％")
_WIDE = ("W", "F")


def count_columns(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    widths = (
        0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in _WIDE)
        for each in text
    )
    return sum(widths)


def pad(text: str, num_columns: int) -> str:
    """A text with spaces behind it up to a number of columns."""
    return text + " " * (num_columns - count_columns(text))


def wrap(line: str, num_columns: int) -> str:
    """A line in lines of a width: broken at spaces and between Chinese characters; longer words stay whole."""
    lines = [""]
    for piece in _PIECES.findall(line):
        fits = count_columns(lines[-1] + piece) <= num_columns or piece in _NEVER_FIRST
        if fits or not lines[-1]:
            lines[-1] += piece
        else:
            lines.append("" if piece.isspace() else piece)
    return "\n".join(each.rstrip() for each in lines)
