"""Texts on a terminal, where a Chinese character takes two columns."""

from __future__ import annotations

import re
import unicodedata

_PIECES = re.compile(r"[^\s⺀-鿿豈-﫿︰-﹏！-｠]+|.", re.DOTALL)
"""What is never broken: words and paths; a Chinese character is a piece of its own."""
_NEVER_FIRST = frozenset("，。、；：！？）》」』”％.,;:!?)")
_NEVER_LAST = frozenset("（《「“")
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
    """A line in lines of a width: broken at spaces and between Chinese characters; longer words stay whole.

    A closing mark takes the character before it along to the next line, and so does what follows an opening one.
    """
    lines: list[list[str]] = [[]]
    for piece in _PIECES.findall(line):
        last = lines[-1]
        if not last or count_columns("".join(last) + piece) <= num_columns:
            last.append(piece)
            continue
        start = len(last)
        while start > 1 and ((piece if start == len(last) else last[start]) in _NEVER_FIRST):
            start -= 1
        while start > 1 and last[start - 1] in _NEVER_LAST:
            start -= 1
        moved = last[start:]
        del last[start:]
        lines.append(moved if piece.isspace() else [*moved, piece])
    return "\n".join("".join(each).rstrip() for each in lines)
