"""What a run leaves behind for its reader: the results file, the generated texts, the last lines on screen."""

import json
import numbers
import os
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO, TypedDict

from finetune.machine.language.columns import count_columns, pad
from finetune.machine.language.translation import translate_piece
from finetune.reporting.progress import format_metric
from finetune.reporting.run_log import to_json_value
from finetune.storage.files import write_atomically

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

MAX_WIDTH = 140
"""Wider than this, lines of running text are hard to follow."""
MIN_COLUMN_WIDTH = 18
"""Narrower samples are shown one below the other."""
MAX_SAMPLE_LINES = 10


class Generation(TypedDict):
    """One line of generated_output.json.

    Attributes:
        source: The prompt.
        output: What the model wrote.
        target: What the data holds in that place.
    """

    source: str
    output: str
    target: str


def write_results(path: str | os.PathLike[str], metrics: Mapping[str, Any]) -> None:
    """Writes the final metrics of a run as one JSON object (NaN and infinity as null).

    Args:
        path: all_results.json; replaced as a whole.
        metrics: Values by name, in the order to be written.
    """
    text = json.dumps(to_json_value(metrics), ensure_ascii=False, allow_nan=False, indent=2)
    write_atomically(path, (text + "\n").encode())


def write_generations(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes generated texts as JSON lines, Chinese as it is.

    Args:
        path: generated_output.json; replaced as a whole.
        rows: One per evaluated sample, in the order of the data.

    Raises:
        KeyError: A row lacks `source`, `output` or `target`.
    """
    lines = []
    for row in rows:
        ordered = {key: row[key] for key in ("source", "output", "target")}
        # A lone surrogate (half of a character cut by generation) has no UTF-8 form.
        lines.append(json.dumps(ordered, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    write_atomically(path, b"".join(lines))


def print_summary(
    title: str,
    *,
    metrics: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]] = (),
    files: Mapping[str, str | os.PathLike[str]] | None = None,
    next_commands: Mapping[str, str] | None = None,
    stream: TextIO | None = None,
) -> None:
    """Prints the last lines of a run.

    Args:
        title: What was done, such as "Trained 600 steps in 3m 20s".
        metrics: Figures by name. Known metrics (`progress.METRIC_FORMATS`, with or without
            "eval_") are shown under their usual names, others as given.
        samples: Prompts with generated and expected text; all that are given are shown.
        files: What lies where, by label ("loss curve").
        next_commands: What to run next: command by purpose ("try it"). Each stands on a line of
            its own and is never wrapped, so that it can be copied.
        stream: stdout by default. Colours and a width above 80 only where it is a terminal.
    """
    console = make_console(stream if stream is not None else sys.stdout)
    console.print()
    console.rule(_text(translate_piece(title), "bold"), align="left")
    if metrics:
        console.print(_metrics_table(metrics))
    if samples:
        _print_samples(console, samples)
    if files:
        _heading(console, "Files")
        labels = {translate_piece(label): path for label, path in files.items()}
        width = max(map(count_columns, labels))
        for label, path in labels.items():
            console.print(_text(f"  {pad(label, width)}  {os.fspath(path)}"), soft_wrap=True)
    if next_commands:
        _heading(console, "Next")
        for purpose, command in next_commands.items():
            console.print(_text(f"  {translate_piece(purpose)}:"), soft_wrap=True)
            console.print(_text(f"    {command}", "green"), soft_wrap=True)
    console.print()


def make_console(stream: TextIO) -> "Console":
    """A console of the width of the terminal, at most `MAX_WIDTH`; 80 columns without colours elsewhere."""
    from rich.console import Console

    if hasattr(stream, "reconfigure"):
        # A terminal or pipe that cannot show a Chinese character must not fail a finished run.
        stream.reconfigure(errors="replace")
    terminal = stream.isatty()
    width = None if terminal else 80
    console = Console(file=stream, force_terminal=terminal, force_jupyter=False, highlight=False, width=width)
    console.width = min(console.width, MAX_WIDTH)
    return console


def _heading(console: "Console", text: str) -> None:
    console.print()
    console.print(_text(translate_piece(text), "bold"))


def _metrics_table(metrics: Mapping[str, Any]) -> "RenderableType":
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, value in metrics.items():
        table.add_row(*_metric_row(name, value))
    return table


def _metric_row(name: str, value: Any) -> "tuple[Text, Text]":
    label, figure = name.replace("_", " "), str(value)
    known = format_metric(name, value)
    if known is not None:
        # A loss may be of the training or of the evaluation; BLEU and ROUGE need no such word.
        label, figure = (label, known[1]) if known[0].islower() else known
    elif isinstance(value, numbers.Integral):
        figure = f"{value:,}"
    elif isinstance(value, numbers.Real):
        figure = f"{float(value):,.4f}"
    return _text(translate_piece(label)), _text(figure, "bold cyan")


def _print_samples(console: "Console", samples: Sequence[Mapping[str, Any]]) -> None:
    """Side by side in a table whose columns share the width, or below each other where it is narrow."""
    from rich import box
    from rich.table import Table

    _heading(console, f"Samples ({len(samples)})")
    width = (console.width - 10) // 3  # three columns: 4 borders, 6 spaces
    names = {"prompt": "source", "generated": "output", "reference": "target"}
    if width < MIN_COLUMN_WIDTH:
        for sample in samples:
            console.print()
            for label, key in names.items():
                console.print(
                    _text(f"{translate_piece(label)}: "), _shorten(sample[key], console.width), sep="\n"
                )
        return
    table = Table(box=box.ROUNDED, show_lines=True)
    for label in names:
        table.add_column(translate_piece(label), width=width, header_style="bold")
    for sample in samples:
        table.add_row(*(_shorten(sample[key], width) for key in names.values()))
    console.print(table)


def _shorten(text: str, width: int) -> "Text":
    """Wraps a text to a width in terminal columns, a Chinese character taking two, and to a few lines."""
    from rich.cells import chop_cells
    from rich.text import Text

    lines: list[str] = []
    for paragraph in _printable(text).splitlines():
        lines.extend(_wrap(paragraph, width))
    if len(lines) > MAX_SAMPLE_LINES:
        last = chop_cells(lines[MAX_SAMPLE_LINES - 1], width - 1)[0]
        lines = [*lines[: MAX_SAMPLE_LINES - 1], last + "…"]
    return Text("\n".join(lines), no_wrap=True) if lines else Text("(empty)", style="dim")


def _wrap(paragraph: str, width: int) -> list[str]:
    """Breaks at spaces, at any Chinese character, and inside words only where they fill a line."""
    from rich.cells import cell_len, chop_cells

    lines, line = [], ""
    for piece in _breakable_pieces(paragraph):
        if cell_len(line + piece.rstrip()) <= width:
            line += piece
            continue
        if line.strip():
            lines.append(line.rstrip())
        *full, line = chop_cells(piece.lstrip(), width) or [""]
        lines.extend(full)
    return [*lines, line.rstrip()]


def _breakable_pieces(paragraph: str) -> list[str]:
    """Words with their following spaces; wide characters one by one, closing punctuation kept with them."""
    pieces: list[str] = []
    for char in paragraph:
        wide = unicodedata.east_asian_width(char) in "WF"
        closing = wide and unicodedata.category(char) in ("Pe", "Pf", "Po")
        before = pieces[-1][-1:] if pieces else ""
        after_break = not before or before == " " or unicodedata.east_asian_width(before) in "WF"
        if pieces and (char == " " or closing or not (wide or after_break)):
            pieces[-1] += char
        else:
            pieces.append(char)
    return pieces


def _printable(text: str) -> str:
    """Escape sequences and other control characters made harmless; a model may write anything."""
    return "".join(
        char if char == "\n" or unicodedata.category(char)[0] != "C" else " " if char == "\t" else "\ufffd"
        for char in text.strip().replace("\r\n", "\n")
    )


def _text(text: str, style: str = "") -> "Text":
    """Text taken literally: rich would read square brackets in a string as markup."""
    from rich.text import Text

    return Text(text, style=style)
