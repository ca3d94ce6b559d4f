"""Figures of a whole split: how much is learned, what was cut, how long samples are, how well they pack."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.packing.packing import pack
from finetune.data.samples.tokenize import Prompt, Sample
from finetune.machine.language.columns import count_columns, pad
from finetune.machine.language.translation import translate_piece

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from finetune.data.packing.packing import Packing
    from finetune.data.samples.data_report import DataReport

_MAX_BARS = 10
_MAX_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a split's report does not say.

    Attributes:
        lengths: int64 [samples], tokens of each that enter the model.
        num_duplicates: Samples with exactly the tokens of an earlier one.
        packing: How the samples share rows, when they do.
        more: Further rows of the table: name, figure, note.
    """

    lengths: NDArray[Any]
    num_duplicates: int
    packing: Packing | None = None
    more: tuple[tuple[str, str, str], ...] = ()


def count_samples(samples: Sequence[Sample], *, pack_to: int | None, seed: int) -> Figures:
    """Figures of samples.

    Args:
        samples: All of a split.
        pack_to: Tokens of a packed row; None: samples do not share rows.
        seed: Decides the packing, as in a run.
    """
    lengths = np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)
    return Figures(
        lengths=lengths,
        # The inputs lack the last token, which is a label.
        num_duplicates=count_repeated([(sample.input_ids, sample.labels[-1:]) for sample in samples]),
        packing=pack(lengths, pack_to, seed=seed) if pack_to is not None else None,
    )


def count_prompts(prompts: Sequence[Prompt]) -> Figures:
    """The same of prompts for evaluation by generation."""
    lengths = np.array([len(prompt.input_ids) for prompt in prompts], dtype=np.int64)
    return Figures(
        lengths=lengths, num_duplicates=count_repeated([(prompt.input_ids,) for prompt in prompts])
    )


def count_repeated(rows: Sequence[tuple[NDArray[Any], ...]]) -> int:
    """How many rows of arrays equal an earlier one."""
    digests = {
        hashlib.blake2b(b"".join(part.tobytes() for part in row), digest_size=16).digest() for row in rows
    }
    return len(rows) - len(digests)


def print_figures(console: Console, title: str, report: DataReport, figures: Figures) -> None:
    """Prints a table and the histogram of a split.

    Args:
        console: Where to.
        title: The name of the split.
        report: Counts of its lines read, kept and left out.
        figures: What was counted besides.
    """
    from rich.text import Text

    console.print()
    console.rule(Text(translate_piece(title), "bold"), align="left")
    rows = [
        (translate_piece(label), figure, translate_piece(note))
        for label, figure, note in _table_rows(report, figures)
    ]
    label_width, figure_width = (max(count_columns(row[column]) for row in rows) for column in (0, 1))
    for label, figure, note in rows:
        line = Text(f"  {pad(label, label_width)}  ").append(f"{figure:>{figure_width}}", "bold cyan")
        console.print(line.append(f"  {note}" if note else ""))
    console.print()
    console.print(Text(f"  {translate_piece('tokens of a sample')}", "bold"))
    for line in _histogram(figures.lengths, console.width, plain=not _shows_blocks(console)):
        console.print(line, soft_wrap=True)


def _table_rows(report: DataReport, figures: Figures) -> list[tuple[str, str, str]]:
    num_files = len(report.files)
    source = f"from {report.num_lines:,} examples" + (
        f" of {num_files:,} file{'s' if num_files > 1 else ''}" if num_files else ""
    )
    rows = [
        ("samples", f"{report.num_samples:,}", source),
        ("tokens", f"{report.num_tokens:,}", "that enter the model"),
    ]
    if report.num_label_tokens:
        share = report.num_label_tokens / max(report.num_tokens, 1)
        rows.append(("learned tokens", f"{report.num_label_tokens:,}", f"{share:.1%}"))
    rows += figures.more
    rows += [
        ("truncated sources", f"{report.num_truncated_source:,}", ""),
        ("truncated targets", f"{report.num_truncated_target:,}", ""),
        ("old rounds left out", f"{report.num_dropped_rounds:,}", ""),
    ]
    if report.num_in_own_template:
        note = "written by the model's own template; chat_template none: plain text"
        rows.append(("in its chat template", f"{report.num_in_own_template:,}", note))
    if report.num_without_template:
        note = "conversations end to end: no template in the model's folder, see chat_template"
        rows.append(("as plain text", f"{report.num_without_template:,}", note))
    if report.num_naming_special:
        note = "spell names of special tokens, see split_special_tokens"
        rows.append(("special names", f"{report.num_naming_special:,}", note))
    reasons = sorted(report.num_dropped.items()) or [("", 0)]
    rows += [("dropped" if place == 0 else "", f"{n:,}", reason) for place, (reason, n) in enumerate(reasons)]
    if report.num_faulty_lines:
        rows.append(("skipped lines", f"{report.num_faulty_lines:,}", f"the first: {report.first_fault}"))
    for label, counts in (
        ("read by rule", report.notes.rules),
        ("fields not used", report.notes.unused_fields),
    ):
        told = sorted(counts.items())
        rows += [(label if place == 0 else "", f"{n:,}", what) for place, (what, n) in enumerate(told)]
    rows.append(("duplicates", f"{figures.num_duplicates:,}", "the same tokens as an earlier sample"))
    if figures.packing is not None:
        packing = figures.packing
        note = f"of {packing.capacity:,} tokens, {packing.efficiency:.2%} full"
        rows.append(("packed rows", f"{len(packing):,}", note))
    return rows


def _histogram(lengths: NDArray[Any], width: int, *, plain: bool) -> list[Text]:
    """One bar for each range of lengths, and the quantiles that people ask for."""
    from rich.text import Text

    step = _bar_step(int(lengths.min()), int(lengths.max()))
    first = (int(lengths.min()) - 1) // step
    counts = np.bincount((lengths - 1) // step - first)
    ranges = [
        _describe_range(place * step + 1, (place + 1) * step) for place in range(first, first + len(counts))
    ]
    figures = [f"{count:,}" for count in counts.tolist()]
    range_width, figure_width = max(map(len, ranges)), max(map(len, figures))
    room = min(width - range_width - figure_width - 14, _MAX_BAR_WIDTH)
    lines = []
    for label, figure, count in zip(ranges, figures, counts.tolist(), strict=True):
        bar = _bar(count / int(counts.max()), room, plain=plain)
        line = Text(f"  {label:>{range_width}}  {figure:>{figure_width}}  {count / len(lengths):>6.1%}  ")
        line.append(bar, "cyan")
        line.rstrip()
        lines.append(line)
    middle, high = np.quantile(lengths, [0.5, 0.95], method="nearest").tolist()
    lines.append(
        Text(
            translate_piece(
                f"  shortest {lengths.min():,}, median {middle:,}, 95% up to {high:,}, longest {lengths.max():,}"
            )
        )
    )
    return lines


def _describe_range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} - {high:,}"


def _bar_step(shortest: int, longest: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that makes few enough bars."""
    steps = (factor * int(10**power) for power in itertools.count() for factor in (1, 2, 5))
    return next(step for step in steps if (longest - 1) // step - (shortest - 1) // step < _MAX_BARS)


def _bar(share: float, width: int, *, plain: bool) -> str:
    """A bar of a share of the width; what is not nothing can be seen."""
    if not share:
        return ""
    if plain:
        return "#" * max(round(share * width), 1)
    full, rest = divmod(max(round(share * width * 8), 1), 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def _shows_blocks(console: Console) -> bool:
    try:
        _EIGHTHS.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
