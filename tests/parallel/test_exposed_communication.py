"""What replicas wait for in a step, played on a virtual clock by the run's own classes."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("stage", "words", "most"),
    [(1, (), 1.23), (1, ("split_param",), 0.39), (2, (), 1.06), (3, (), 4.85)],
)
def test_sharding_waits_for_no_more_than_this(stage, words, most):
    step = time_of_step(stage, NUM_MICRO_BATCHES, COSTS, words=words)
    assert step.computed == pytest.approx(NUM_MICRO_BATCHES * 3 * COSTS.forward)
    assert 0 < step.exposed < most


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
