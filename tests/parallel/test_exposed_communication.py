"""What replicas wait for in a step, played on a virtual clock by the run's own classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from paddle.distributed import fleet

from benchmarks.exposed_communication import EMBEDDING, Clock, Costs, scale_buckets, time_of_step
from finetune.parallel.sharding import flat_slices

# 7B parameters in bfloat16, 16 replicas with 25 GB/s each.
COSTS = Costs()
NUM_MICRO_BATCHES = 4
SUM = COSTS.ring(13.47e9, 2)
"""Of all gradients, in one piece."""


@pytest.fixture(autouse=True)
def own_fleet(monkeypatch):
    for name in ("_hcg", "_user_defined_strategy"):
        monkeypatch.setattr(fleet.fleet, name, None, raising=False)
    monkeypatch.setattr(flat_slices, "BUCKET_BYTES", flat_slices.BUCKET_BYTES)
    scale_buckets()


def test_plain_replicas_sum_beside_the_last_backward_pass():
    waiting = time_of_step(0, NUM_MICRO_BATCHES, COSTS, overlaps=False)
    beside = time_of_step(0, NUM_MICRO_BATCHES, COSTS)
    assert waiting.computed == beside.computed == pytest.approx(NUM_MICRO_BATCHES * 3 * COSTS.forward)
    assert SUM < waiting.exposed < 1.15 * SUM  # buckets have latencies of their own
    backward = 2 * COSTS.forward
    assert beside.exposed < waiting.exposed - 0.97 * backward
    # On a link that is fast enough, what is left are the sums of what has its gradients last, a matrix of the first
    # layer and the embedding, and of the step's numbers.
    fast = Costs(bandwidth=100e9)
    left = fast.ring((1 + EMBEDDING) * 2 * 4096 * 4096, 2) + 3 * fast.ring(0, 2)
    assert left * 0.99 < time_of_step(0, NUM_MICRO_BATCHES, fast).exposed < 1.1 * left


# Bytes of a micro-batch: all gradients go half round the ring, all weights the other half.
HALF = SUM / 2


@pytest.mark.parametrize(
    ("stage", "words", "num_halves"),
    [(1, ("split_param",), 2), (2, (), NUM_MICRO_BATCHES + 1), (3, (), 3 * NUM_MICRO_BATCHES)],
)
def test_sharding_exchanges_while_it_computes(stage, words, num_halves):
    waiting = time_of_step(stage, NUM_MICRO_BATCHES, COSTS, overlaps=False, words=words)
    beside = time_of_step(stage, NUM_MICRO_BATCHES, COSTS, words=words)
    assert beside.computed == waiting.computed == pytest.approx(NUM_MICRO_BATCHES * 3 * COSTS.forward)
    assert num_halves * HALF < waiting.exposed < 1.15 * num_halves * HALF
    if stage == 3:  # the link is busy all the time: nothing is left to be hidden
        assert beside.exposed < 1.05 * (waiting.exposed - beside.computed)
    else:
        assert beside.exposed < HALF


def test_fleets_stage_1_reduces_and_broadcasts_while_it_computes():
    waiting = time_of_step(1, NUM_MICRO_BATCHES, COSTS, overlaps=False)
    assert SUM < waiting.exposed < 1.25 * SUM
    assert time_of_step(1, NUM_MICRO_BATCHES, COSTS).exposed < HALF


def test_sums_over_equal_replicas_go_beside_those_into_slices():
    words, copies = ("split_param",), {"num_copies": 4}
    waiting = time_of_step(1, NUM_MICRO_BATCHES, COSTS, words=words, overlaps=False, **copies)
    beside = time_of_step(1, NUM_MICRO_BATCHES, COSTS, words=words, **copies)
    assert beside.exposed < 0.3 * waiting.exposed
    of_slices = replace(COSTS, num_replicas=4).ring(13.47e9 / 4, 2)
    assert beside.exposed < time_of_step(1, NUM_MICRO_BATCHES, COSTS, words=words).exposed + of_slices / 2


def test_the_clock_hides_what_nobody_waits_for():
    clock = Clock()
    first = clock.begin(2.0)
    second = clock.begin(1.0)  # the link is busy till then
    clock.compute(1.5)
    assert (first, second, clock.now) == (2.0, 3.0, 1.5)
    clock.wait(first)
    clock.compute(4.0)
    clock.wait(second)
    assert (clock.now, clock.computed) == (6.0, 5.5)
    assert clock.begin(1.0) == 7.0
