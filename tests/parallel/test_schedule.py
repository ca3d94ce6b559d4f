"""The schedule of a pipeline: every part once, on its rank, after what it needs, with transfers that meet."""

from __future__ import annotations

from collections import Counter

import pytest

from finetune.parallel.pipe.schedule import Event, schedule

SHAPES = [(1, 1, 3), (2, 1, 1), (2, 1, 4), (2, 2, 3), (3, 2, 4), (4, 1, 2), (4, 3, 9)]
"""Ranks, chunks on each, micro-batches."""


def events_of_all(shape: tuple[int, int, int]) -> list[list[Event]]:
    return [schedule(*shape, rank) for rank in range(shape[0])]


def computed(events: list[Event], kind: str) -> list[tuple[int, int]]:
    return [(event.part, event.micro_batch) for event in events if event.kind == kind]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_computes_its_own_parts_once_in_each_direction(shape):
    num_ranks, num_chunks, num_micro_batches = shape
    for rank, events in enumerate(events_of_all(shape)):
        parts = range(rank, num_ranks * num_chunks, num_ranks)
        expected = Counter((part, batch) for part in parts for batch in range(num_micro_batches))
        assert Counter(computed(events, "forward")) == expected
        assert Counter(computed(events, "backward")) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_what_one_rank_sends_the_other_receives_in_the_same_order(shape):
    all_events = events_of_all(shape)
    for sender, events in enumerate(all_events):
        for receiver, others in enumerate(all_events):
            sent = [(e.part, e.micro_batch, e.of) for e in events if e.kind == "send" and e.peer == receiver]
            received = [
                (e.part, e.micro_batch, e.of) for e in others if e.kind == "receive" and e.peer == sender
            ]
            assert sent == received


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_computed_before_what_it_needs_is_there(shape):
    num_parts = shape[0] * shape[1]
    for events in events_of_all(shape):
        seen: set[tuple[str, int, int]] = set()
        for event in events:
            key = (event.of or event.kind, event.part, event.micro_batch)
            if event.kind == "receive":
                seen.add(("received " + key[0], *key[1:]))
            elif event.kind == "forward" and event.part > 0:
                assert ("received forward", *key[1:]) in seen or shape[0] == 1
            elif event.kind == "backward":
                assert ("forward", *key[1:]) in seen, "no backward pass before its forward pass"
                last = event.part == num_parts - 1
                assert last or ("received backward", *key[1:]) in seen or shape[0] == 1
            if event.kind in ("forward", "backward"):
                seen.add(key)


def test_without_chunks_a_rank_holds_no_more_micro_batches_than_ranks_follow():
    for rank, events in enumerate(events_of_all((4, 1, 12))):
        alive = most = 0
        for event in events:
            alive += (event.kind == "forward") - (event.kind == "backward")
            most = max(most, alive)
        assert most == 4 - rank
