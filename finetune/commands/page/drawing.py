"""What the page shows as HTML and SVG: progress, the curve, a preview. All of it is made here, from escaped text."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence

from finetune.commands.page.run_folder import STARTING, RunState

Points = Sequence[tuple[int, float]]

_WIDTH, _HEIGHT = 480, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 12, 28
_MAX_POINTS = 400
_MARKS = re.compile(r"(\[\[|\]\])")

CSS = """
.run-state { display: flex; flex-wrap: wrap; gap: .4em 1.6em; align-items: baseline }
.run-state b { font-size: 1.15em }
.run-bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); margin: .5em 0; overflow: hidden }
.run-bar div { height: 100%; background: var(--color-accent) }
.run-curve { width: 100%; max-width: 600px; height: auto; display: block; margin: 0 auto }
.run-curve text { fill: var(--body-text-color-subdued); font-size: 12px; font-family: inherit }
@media (max-width: 640px) { .run-curve text { font-size: 17px } [id^=answers] { height: 300px !important } }
.run-legend { text-align: center; font-size: .9em; color: var(--body-text-color-subdued) }
.run-text { white-space: pre; overflow-x: auto; font-family: var(--font-mono); font-size: .82em; line-height: 1.45;
  max-height: 32em; border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .7em }
.run-log { display: flex; flex-direction: column-reverse; max-height: 20em; white-space: pre-wrap; overflow-wrap: anywhere }
.run-text mark { background: #bbf7d0; color: #14532d; border-radius: 3px }
.run-lines { margin: .2em 0; padding: 0; list-style: none }
"""


def draw_state(state: RunState, words: Mapping[str, str]) -> str:
    """One line of figures and a bar."""
    share = 0.0 if not state.num_steps else min(1.0, state.step / state.num_steps)
    figures = [f"<b>{_escape(words[f'kind_{state.kind}'])}</b>"]
    if state.step:
        total = f" / {state.num_steps:,}" if state.num_steps else ""
        figures.append(_figure(words["step"], f"{state.step:,}{total}"))
    if state.loss is not None:
        figures.append(_figure(words["loss"], f"{state.loss:.4f}"))
    if state.tokens_per_second:
        figures.append(_figure(words["speed"], f"{state.tokens_per_second:,.0f} {words['tokens_a_second']}"))
    if state.seconds_left is not None:
        figures.append(_figure(words["time_left"], format_seconds(state.seconds_left)))
    note = (
        f'<div class="run-legend">{_escape(words["starting_note"])}</div>' if state.kind == STARTING else ""
    )
    shown = "".join(f"<span>{each}</span>" for each in figures)
    bar = f'<div class="run-bar"><div style="width: {share:.1%}"></div></div>'
    return f'<div class="run-state">{shown}</div>{bar}{note}'


def draw_curve(state: RunState, words: Mapping[str, str]) -> str:
    """The losses by step, as a picture in the page."""
    curve, evaluations = _thin(state.curve), _thin(state.evaluations)
    everything = [*curve, *evaluations]
    if len(curve) < 2:
        return ""
    right = max(step for step, _ in everything)
    low, high = min(loss for _, loss in everything), max(loss for _, loss in everything)
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    scale = _Scale(curve[0][0], max(right, curve[0][0] + 1), low, high)
    parts = [*_axes(scale), _line(scale, curve, "var(--color-accent)")]
    legend = f'<span style="color: var(--color-accent)">{_escape(words["training_loss"])}</span>'
    if evaluations:
        parts += [_line(scale, evaluations, "#f59e0b"), *_dots(scale, evaluations)]
        legend = f'{legend} · <span style="color: #d97706">{_escape(words["evaluation_loss"])}</span>'
    label = _escape(words["curve"])
    return (
        f'<svg class="run-curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f'{"".join(parts)}</svg><div class="run-legend">{label}: {legend}</div>'
    )


def draw_text(text: str) -> str:
    """What a command printed."""
    return f'<div class="run-text">{_escape(text)}</div>' if text else ""


def draw_log(text: str) -> str:
    """What a run said, of which the end is seen first."""
    return f'<div class="run-text run-log"><div>{_escape(text)}</div></div>' if text else ""


def draw_preview(text: str) -> str:
    """What a preview printed: what is learned is marked instead of standing in ``[[ ]]``."""
    lines, is_open = [], False
    for line in text.splitlines():
        if "[[ ]]" in line:  # its explanation of the marks
            continue
        if not line.strip() or line.replace(" ", "").isdecimal():  # the ids below the tokens
            lines.append(line)
            continue
        shown, is_open = _mark(line, is_open)
        lines.append(shown)
    shown = "\n".join(lines).strip("\n")
    return f'<div class="run-text">{shown}</div>'


def _mark(line: str, is_open: bool) -> tuple[str, bool]:
    """A line of tokens with marks, and whether the last of them goes on in the next line."""
    indent = line[: len(line) - len(line.lstrip())]
    parts = [indent, "<mark>" * is_open]
    for piece in _MARKS.split(line.strip()):
        if piece in ("[[", "]]"):
            if (piece == "[[") == is_open:  # it is text
                parts.append(piece)
                continue
            is_open = not is_open
            parts.append("<mark>" if is_open else "</mark>")
        else:
            parts.append(_escape(piece))
    return "".join([*parts, "</mark>" * is_open]), is_open


def draw_lines(lines: Sequence[str], *, sign: str = "") -> str:
    """Short lines one below the other."""
    items = "".join(f"<li>{sign}{_escape(line)}</li>" for line in lines)
    return f'<ul class="run-lines">{items}</ul>'


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03 or 2:03."""
    whole = math.ceil(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class _Scale:
    """From steps and losses to places in the picture."""

    def __init__(self, first: int, last: int, low: float, high: float):
        self.first, self.last, self.low, self.high = first, last, low, high

    def x(self, step: float) -> float:
        return _LEFT + (step - self.first) / (self.last - self.first) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, loss: float) -> float:
        return _TOP + (self.high - loss) / (self.high - self.low) * (_HEIGHT - _TOP - _BOTTOM)


def _axes(scale: _Scale) -> list[str]:
    parts = []
    for loss in _ticks(scale.low, scale.high):
        y = scale.y(loss)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity=".15"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.4g}</text>'
        )
    bottom = _HEIGHT - 7
    for step in _ticks(scale.first, scale.last):
        if step == int(step):
            parts.append(
                f'<text x="{scale.x(step):.1f}" y="{bottom}" text-anchor="middle">{int(step)}</text>'
            )
    return parts


def _ticks(low: float, high: float, num: int = 7) -> list[float]:
    """Round numbers between two."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [number * size for number in range(first, math.floor(high / size + 1e-9) + 1)]


def _line(scale: _Scale, points: Points, colour: str) -> str:
    places = " ".join(f"{scale.x(step):.1f},{scale.y(loss):.1f}" for step, loss in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>'


def _dots(scale: _Scale, points: Points) -> list[str]:
    return [
        f'<circle cx="{scale.x(step):.1f}" cy="{scale.y(loss):.1f}" r="3" fill="#f59e0b"/>'
        for step, loss in points
    ]


def _thin(points: Points) -> Points:
    """Some of many points, the last among them."""
    finite = [point for point in points if math.isfinite(point[1])]
    stride = math.ceil(len(finite) / _MAX_POINTS) or 1
    return finite[::-1][::stride][::-1]


def _figure(name: str, value: str) -> str:
    return f"{_escape(name)} <b>{_escape(value)}</b>"


def _escape(text: str) -> str:
    return html.escape(text)
