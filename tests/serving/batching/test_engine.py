"""Who runs, who waits, who is cancelled, and whom a failure hits; with a model that only counts."""

from __future__ import annotations

import time

import pytest

from finetune.serving.batching.engine import ClosedError, Engine, QueueFullError
from tests.serving.batching.builders import CountingMaker, Told, decoding, make_row


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def maker() -> CountingMaker:
    return CountingMaker()


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_rows_share_steps_and_the_next_takes_a_free_place(maker, told):
    maker.gate.clear()
    with decoding(maker, max_rows=2) as engine:
        for number, size in enumerate((10, 3, 3, 3)):
            engine.submit([[make_row(told, number, [number * 100], max_new_tokens=size)]])
        maker.gate.set()
        assert told.wait(4) == [1, 2, 3, 0]
    assert [len(told.texts[number]) for number in range(4)] == [10, 3, 3, 3]
    assert max(maker.sizes) == 2
    assert len(maker.sizes) == 9, "the long row needs 9 steps behind its prompt, and the others go along"


def test_no_more_may_wait_than_is_said(maker, told):
    maker.gate.clear()
    with decoding(maker, max_rows=1, max_waiting=2) as engine:
        rows = [make_row(told, number, [1]) for number in range(5)]
        engine.submit([rows[:2]])
        engine.submit([[rows[2]]])
        with pytest.raises(QueueFullError):
            engine.submit([[rows[3]]])
        engine.cancel([rows[2]])
        engine.submit([[rows[4]]])
        maker.gate.set()
        assert sorted(told.wait(3)) == [0, 1, 4]
    assert not rows[3].tokens and not rows[2].tokens


def test_how_long_a_place_takes_follows_the_rows(maker, told):
    maker.gate.clear()
    with decoding(maker, max_rows=2) as engine:
        assert engine.seconds_to_room == 0
        engine.submit([[make_row(told, number, [1]) for number in range(2)]])
        wait_until(lambda: engine._running)
        time.sleep(0.5)
        maker.gate.set()
        told.wait(2)
        wait_until(lambda: not engine.num_rows)
        # Two rows of half a second, a fifth each, two at a time.
        assert 0.05 < engine.seconds_to_room < 5


def test_all_rows_of_a_request_are_taken_or_none(maker, told):
    maker.gate.clear()
    with decoding(maker, max_rows=2, max_waiting=1) as engine:
        with pytest.raises(QueueFullError):
            engine.submit([[make_row(told, 0, [1])], [make_row(told, 1, [2]) for _ in range(3)]])
        assert engine.num_rows == 0
        maker.gate.set()


def test_a_cancelled_row_leaves_and_is_told_nothing_more(maker, told):
    with decoding(maker, max_rows=2) as engine:
        row, other = (make_row(told, number, [1], max_new_tokens=10**9) for number in range(2))
        engine.submit([[row, other]])
        wait_until(lambda: told.texts.get(0))
        engine.cancel([row])
        wait_until(lambda: engine.num_rows == 1)
        made = len(row.tokens)
        before = len(other.tokens)
        wait_until(lambda: len(other.tokens) > before + 20)
        assert len(row.tokens) == made and 0 not in told.last
        engine.cancel([other])
        wait_until(lambda: engine.num_rows == 0)


def test_a_prompt_that_fails_ends_its_request_alone(maker, told):
    maker.fails = lambda rows: any(row.prompt == (13,) for row in rows)
    with decoding(maker) as engine:
        for number, prompt in enumerate(([1], [13], [2])):
            engine.submit([[make_row(told, number, prompt)]])
        told.wait(3)
    assert isinstance(told.last[1].error, RuntimeError)
    assert [told.last[number].finish for number in (0, 2)] == ["length"] * 2
    assert len(told.texts[0]) == len(told.texts[2]) == 8


def test_a_step_that_fails_ends_only_the_row_that_fails_alone(maker, told):
    """The others are read again with what they have, and their texts go on as if nothing had been."""
    maker.fails = lambda rows: any(row.prompt == (13,) and len(row.tokens) == 4 for row in rows)
    with decoding(maker) as engine:
        engine.submit([[make_row(told, number, prompt)] for number, prompt in enumerate(([1], [13], [2]))])
        told.wait(3)
    assert isinstance(told.last[1].error, RuntimeError) and told.last[1].num_tokens == 4
    assert told.texts[0] == "cdefghij" and told.texts[2] == "defghijk"


def test_a_batch_that_is_too_large_is_finished_one_by_one(maker, told):
    maker.fails = lambda rows: len(rows) > 1 and len(rows[0].tokens) == 5
    with decoding(maker) as engine:
        engine.submit([[make_row(told, number, [number])] for number in range(3)])
        told.wait(3)
        assert {update.finish for update in told.last.values()} == {"length"}
        engine.submit(
            [[make_row(told, 3, [3], max_new_tokens=3)], [make_row(told, 4, [4], max_new_tokens=3)]]
        )
        told.wait(2)
    assert maker.sizes[-1] == 2, "rows that come later share steps again"


def test_a_text_that_fails_ends_its_row_alone(maker, told):
    broken = make_row(told, 0, [1])

    def fail(text: str) -> str:
        raise ValueError("no text")

    broken._stops.push = fail
    with decoding(maker) as engine:
        engine.submit([[broken], [make_row(told, 1, [2])]])
        told.wait(2)
    assert isinstance(told.last[0].error, ValueError) and told.last[1].finish == "length"


def test_closing_tells_everybody(maker, told):
    engine = Engine(maker, max_rows=1, max_waiting=5)
    engine.start()
    engine.submit([[make_row(told, number, [1], max_new_tokens=10**9)] for number in range(3)])
    wait_until(lambda: told.texts.get(0))
    engine.close(timeout=30)
    assert sorted(told.wait(3)) == [0, 1, 2]
    assert all(isinstance(update.error, ClosedError) for update in told.last.values())
    with pytest.raises(ClosedError):
        engine.submit([[make_row(told, 3, [1])]])
    assert engine.num_rows == 0


def test_a_model_that_is_gone_closes_the_engine(maker, told):
    class GoneError(BaseException):
        pass

    def go(rows):
        raise GoneError

    maker.fails = go
    engine = Engine(maker, max_rows=1, max_waiting=5)
    engine._thread._target = _quiet(engine._thread._target, GoneError)  # type: ignore[attr-defined]
    engine.start()
    engine.submit([[make_row(told, 0, [1])]])
    told.wait(1)
    assert engine.is_closed and isinstance(told.last[0].error, ClosedError)


def _quiet(function, error):
    def run():
        with pytest.raises(error):
            function()

    return run
