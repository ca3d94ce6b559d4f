"""Batches made one step ahead: same order, same positions, faults where they belong, and an end."""

from __future__ import annotations

import threading
import time

import pytest

from finetune.data.batches.batch_source import StepBatch
from finetune.errors import UserError
from finetune.training.prefetch import PrefetchedSource

TIMEOUT = 20


class RecordingSource:
    """Notes what it is asked and by which thread; a batch waits until it is let go."""

    steps_per_epoch = 3

    def __init__(self, faulty_step: int = -1):
        self.asked: list[tuple[str, int]] = []
        self.threads: set[str] = set()
        self.may_pass = threading.Event()
        self.may_pass.set()
        self.inside = 0
        self.faulty_step = faulty_step

    def batch(self, step):
        assert self.inside == 0, "two threads at a time"
        self.inside += 1
        self.asked.append(("batch", step))
        self.threads.add(threading.current_thread().name)
        assert self.may_pass.wait(TIMEOUT)
        time.sleep(0.005)
        self.inside -= 1
        if step == self.faulty_step:
            raise UserError("a faulty line")
        return StepBatch([], step, 0)

    def epoch(self, num_steps):
        return num_steps / 3

    def ends_epoch(self, num_steps):
        return num_steps % 3 == 0

    def save(self, folder, num_steps):
        assert self.inside == 0, "two threads at a time"
        self.asked.append(("save", num_steps))
        return {"step": num_steps}

    def restore(self, checkpoint, position):
        return f"restored {position['step']}"

    def close(self):
        self.asked.append(("close", 0))
        self.may_pass.set()
        return "closed"


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def wait_until(condition) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_next_batch_is_made_while_a_step_runs_and_none_beyond_the_last():
    source = RecordingSource()
    prefetched = PrefetchedSource(source, 5)
    assert prefetched.restore(None, {"step": 2}) == "restored 2"
    for step in range(2, 5):
        assert prefetched.batch(step).num_tokens == step
        if step < 4:
            wait_until(lambda step=step: source.asked[-1] == ("batch", step + 1))
    assert source.asked == [("batch", 2), ("batch", 3), ("batch", 4)]
    assert len(source.threads) == 2, "the first batch is needed at once, the others are made by a thread"
    assert prefetched.close() == "closed" and not threads()


def test_a_save_waits_for_the_thread_and_is_about_the_steps_that_are_done():
    source = RecordingSource()
    prefetched = PrefetchedSource(source, 9)
    prefetched.batch(0)
    assert prefetched.save(None, 1) == {"step": 1}
    assert prefetched.batch(1).num_tokens == 1
    assert source.asked[:3] == [("batch", 0), ("batch", 1), ("save", 1)]
    assert (prefetched.epoch(3), prefetched.ends_epoch(3), prefetched.steps_per_epoch) == (1.0, True, 3)
    prefetched.close()


def test_a_fault_is_raised_by_the_step_whose_batch_it_is():
    prefetched = PrefetchedSource(RecordingSource(faulty_step=2), 9)
    for step in range(2):
        assert prefetched.batch(step).num_tokens == step
    assert prefetched.save(None, 2) == {"step": 2}
    with pytest.raises(UserError, match="a faulty line"):
        prefetched.batch(2)
    prefetched.close()


def test_closing_ends_the_thread_though_it_waits_for_a_batch():
    source = RecordingSource()
    prefetched = PrefetchedSource(source, 9)
    source.may_pass.set()
    prefetched.batch(0)
    wait_until(lambda: not source.inside and source.asked[-1] == ("batch", 1))
    source.may_pass.clear()
    prefetched.batch(1)
    wait_until(lambda: source.inside)
    assert prefetched.close() == "closed"
    assert source.asked[-1] == ("close", 0) and not threads()
