"""Stop strings end a text at the same place however it is cut into stretches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.serving.batching.stop_strings import StopStrings
from tests.serving.batching.builders import Told, make_row


def expected(text: str, stops: list[str]) -> str:
    """The text in front of the stop string that is complete first, letter by letter; of several the longest."""
    for end in range(1, len(text) + 1):
        if met := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, met))]
    return text


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_stretches_change_nothing(parts, stops):
    strings = StopStrings(stops)
    shown = []
    for part in parts:
        shown.append(strings.push(part))
    met = strings.is_met
    shown.append(strings.finish())
    text = "".join(parts)
    assert met == any(stop in text for stop in stops)
    assert "".join(shown) == expected(text, stops)


def test_only_what_may_be_a_beginning_is_held_back():
    strings = StopStrings(["END", "!!"])
    assert [strings.push(part) for part in ("a", "bE", "N", "x", "E", "ND", "more")] == [
        "a",
        "b",
        "",
        "ENx",
        "",
        "",
        "",
    ]
    assert strings.is_met and strings.finish() == ""


def test_what_is_held_back_comes_at_the_end():
    strings = StopStrings(["END"])
    assert strings.push("abEN") == "ab" and strings.finish() == "EN" and not strings.is_met


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens", "finish"),
    [
        (("de",), "c", 3, "stop"),  # across tokens
        (("j",), "cdefghi", 8, "stop"),  # in the last token that may be
        (("jz",), "cdefghij", 8, "length"),  # a beginning that nothing follows
        (("x", "gh", "cdx"), "cdef", 6, "stop"),
    ],
)
def test_a_row_ends_in_front_of_a_stop_string(stop, text, num_tokens, finish):
    told = Told()
    row = make_row(told, 0, [1], stop=stop)
    for token in range(2, 30):
        if row.take([token]):
            break
    assert told.texts[0] == text and told.last[0].finish == finish and told.last[0].num_tokens == num_tokens


def test_the_end_token_is_no_text_and_not_counted():
    told = Told()
    row = make_row(told, 0, [1], stop_ids=(4,))
    assert not row.take([2]) and row.take([3, 4, 5])
    assert told.texts[0] == "cd" and told.last[0].finish == "stop" and told.last[0].num_tokens == 2
