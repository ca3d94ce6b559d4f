"""What the pipelines' engines do in a step, played on a virtual clock: hardly longer than ideal 1F1B."""

from __future__ import annotations

import pytest

from benchmarks.pipeline_time import Costs, DeadlockError, Program, play, record, time_over_ideal

# A quarter of a 7B model on each card, 4096 tokens in bfloat16, 25 GB/s between them.
COSTS = Costs(forward=0.1, backward=0.2, transfer=0.00136)


@pytest.mark.parametrize("num_micro_batches", [8, 16, 32])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize(("num_chunks", "most"), [(1, 1.03), (2, 1.08), (3, 1.08)])
def test_a_step_takes_hardly_longer_than_ideal(num_ranks, num_chunks, num_micro_batches, most):
    assert 1 <= time_over_ideal(num_ranks, num_chunks, num_micro_batches, COSTS) <= most


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 3)])
def test_any_number_of_micro_batches_ends(num_ranks, num_chunks, num_micro_batches):
    """Also where transfers take as long as computing, and passes as long as each other."""
    for costs in (COSTS, Costs(1.0, 1.0, 1.0), Costs(1.0, 3.0, 0.5)):
        programs = record(num_ranks, num_chunks, num_micro_batches)
        assert play(programs, costs) > 0


def test_a_micro_batch_too_many_for_equal_groups_costs_little():
    assert time_over_ideal(2, 2, 9, COSTS) <= 1.05
    assert time_over_ideal(4, 2, 9, COSTS) <= 1.12


def computing_and_sending(kinds: list[str], peer: int, *, waits: bool) -> Program:
    program = Program()
    for kind in kinds:
        if kind in ("send", "receive"):
            transfer = program.begin(kind, peer)
            if waits:
                program.wait(transfer)
        else:
            program.compute(kind)
    return program


def test_the_clock_knows_what_waits_for_what():
    costs = Costs(forward=1.0, backward=2.0, transfer=0.5)
    sender = computing_and_sending(["forward", "send", "forward"], 1, waits=True)
    late = computing_and_sending(["backward", "receive", "forward"], 0, waits=True)
    # The transfer begins when both ask for it, at 2, and ends at 2.5; then both compute for 1.
    assert play([sender, late], costs) == 3.5
    beside = computing_and_sending(["forward", "send", "forward"], 1, waits=False)
    assert play([beside, computing_and_sending(["receive"], 0, waits=True)], costs) == 2.0


def test_ranks_that_wait_for_each_other_are_found():
    both = [computing_and_sending(["receive", "send"], peer, waits=True) for peer in (1, 0)]
    with pytest.raises(DeadlockError, match="both receive"):
        play(both, COSTS)
    with pytest.raises(DeadlockError, match="wait for each other"):
        play([computing_and_sending(["receive"], 1, waits=True), Program()], COSTS)
