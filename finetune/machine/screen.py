"""Lines for a person, in his language: on a terminal broken between words, errors in red and warnings in yellow.

Elsewhere (a file, a pipe) a line stays one line without colours, so that programs can search for it. `NO_COLOR` in the
environment is obeyed on terminals too (no-color.org).
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

from finetune.machine.language.columns import count_columns, wrap
from finetune.machine.language.translation import translate, translate_piece

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


def print_text(*texts: str, stream: TextIO | None = None) -> None:
    """Prints texts in the person's language, each on lines of its own and whole: commands can be copied.

    Args:
        texts: In English.
        stream: stdout by default.
    """
    print(*map(translate_piece, texts), sep="\n", file=sys.stdout if stream is None else stream, flush=True)


def format_for(text: str, stream: TextIO) -> str:
    """A text as it is shown on a stream: in the person's language, on a terminal fitted to its width."""
    shown = translate_piece(text)
    if not stream.isatty():
        return shown
    width = shutil.get_terminal_size().columns
    wrapped = "\n".join(_wrap(line, width) for line in shown.split("\n"))
    for label, colour in _COLOURS.items():
        name = translate(label.rstrip())
        if text.startswith(label) and wrapped.startswith(name) and not os.environ.get("NO_COLOR"):
            return f"{colour}{name}{_PLAIN}{wrapped[len(name) :]}"
    return wrapped


def _wrap(line: str, width: int) -> str:
    """A line in pieces between words; a longer word, such as a path, stays whole, and so do indented lines."""
    if count_columns(line) <= width or line[:1].isspace():
        return line
    return wrap(line, width)
