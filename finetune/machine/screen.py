"""Lines for a person: on a terminal broken between words, with errors in red and warnings in yellow.

Elsewhere (a file, a pipe) a line stays one line without colours, so that programs can search for it. `NO_COLOR` in the
environment is obeyed on terminals too (no-color.org).
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TextIO

_COLOURS = {"error: ": "\033[1;31m", "warning: ": "\033[1;33m"}
_PLAIN = "\033[0m"


def show_line(text: str, stream: TextIO | None = None) -> None:
    """Prints a text of one line or more, at once.

    Args:
        text: What begins with "error: " or "warning: " gets the colour of that.
        stream: stderr by default.
    """
    stream = sys.stderr if stream is None else stream
    print(format_for(text, stream), file=stream, flush=True)


def format_for(text: str, stream: TextIO) -> str:
    """A text as it is shown on a stream: untouched, or fitted to the terminal."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    wrapped = "\n".join(_wrap(line, width) for line in text.split("\n"))
    for label, colour in _COLOURS.items():
        if wrapped.startswith(label) and not os.environ.get("NO_COLOR"):
            return f"{colour}{label.rstrip()}{_PLAIN} {wrapped[len(label) :]}"
    return wrapped


def _wrap(line: str, width: int) -> str:
    """A line in pieces between words; a longer word, such as a path, stays whole, and so do indented lines."""
    if len(line) <= width or line[:1].isspace():
        return line
    return textwrap.fill(
        line, width, break_long_words=False, break_on_hyphens=False, drop_whitespace=True, tabsize=8
    )
