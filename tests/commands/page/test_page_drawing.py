"""What the page shows: pictures and texts, made of values that came from files."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from finetune.commands.page.drawing import (
    draw_curve,
    draw_lines,
    draw_log,
    draw_preview,
    draw_state,
    draw_text,
    format_seconds,
)
from finetune.commands.page.run_folder import RunState
from finetune.commands.page.texts import TEXTS

WORDS = TEXTS["en"]


def places(state):
    """Points of the lines of a curve's picture."""
    picture = ElementTree.fromstring(f"<div>{draw_curve(state, WORDS)}</div>")
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
        for line in picture.iter("polyline")
    ]


def test_a_curve_shows_the_losses_in_their_order():
    state = RunState(kind="running", curve=((1, 4.0), (2, 3.0), (5, 1.0)), evaluations=((2, 2.0), (5, 1.5)))
    training, evaluation = places(state)
    assert [x for x, _ in training] == sorted(x for x, _ in training)
    assert [y for _, y in training] == sorted(y for _, y in training), "a lower loss stands lower"
    assert training[0] == (56.0, 12.0) and training[-1] == (464.0, 212.0)
    assert evaluation[0][0] == training[1][0] and training[1][1] < evaluation[0][1] < training[2][1]


@pytest.mark.parametrize(
    "curve", [(), ((1, 2.0),), ((1, float("nan")), (2, 1.0)), ((3, 2.0), (3, 2.0)), ((1, 2.0), (2, 2.0))]
)
def test_odd_curves_are_drawn_or_left_out(curve):
    drawn = draw_curve(RunState(kind="running", curve=curve), WORDS)
    assert "nan" not in drawn and (not drawn or ElementTree.fromstring(f"<div>{drawn}</div>") is not None)


def test_a_long_curve_is_thinned_but_keeps_its_end():
    curve = tuple((step, 5 - step / 20_000) for step in range(1, 100_001))
    (line,) = places(RunState(kind="running", curve=curve))
    assert len(line) <= 400 and line[-1] == (464.0, 212.0)


def test_a_state_in_both_languages():
    state = RunState(
        kind="running", step=1200, num_steps=2400, loss=1.5, tokens_per_second=1234.5, seconds_left=3723
    )
    english, chinese = draw_state(state, WORDS), draw_state(state, TEXTS["zh"])
    for shown in ("1,200 / 2,400", "1.5000", "1,234 tokens/s", "1:02:03", "width: 50.0%"):
        assert shown in english
    assert "训练中" in chinese and "1,234 词元/秒" in chinese
    for kind in ("starting", "stopping", "stopped", "failed", "finished"):
        assert WORDS[f"kind_{kind}"] in draw_state(RunState(kind=kind), WORDS)
    assert [format_seconds(each) for each in (0, 59.2, 60, 3600)] == ["0:00", "1:00", "1:00", "1:00:00"]


def test_what_is_learned_is_marked():
    text = "What is learned is in [[ ]]; below\n\n  <s> a [[b\n  1   2 3\n  c </s>]] d\n  4 5    6\n\n  x ]] [[y]]\n"
    shown = draw_preview(text)
    assert "learned is in" not in shown
    assert re.findall("<mark>(.*?)</mark>", shown) == ["b", "c &lt;/s&gt;", "y"]
    assert "x ]] " in shown and "&lt;s&gt; a " in shown and "  1   2 3\n" in shown
    assert draw_preview("[[a [[b").count("<mark>") == draw_preview("[[a [[b").count("</mark>") == 1


@pytest.mark.parametrize("draw", [draw_text, draw_log, draw_preview, lambda text: draw_lines([text])])
def test_no_text_becomes_markup(draw):
    evil = '<script>alert(1)</script><img src=x onerror="a"> [[<b>]] \' &amp;'
    shown = draw(evil)
    assert "<script" not in shown and "<img" not in shown and "<b>" not in shown and "&amp;amp;" in shown
