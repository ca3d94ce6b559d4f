"""What the pipelines' engines do in a step, played on a virtual clock: hardly longer than ideal 1F1B."""

from __future__ import annotations

import pytest

from benchmarks.pipeline_time import Costs, DeadlockError, Program, count_alive, play, record, time_over_ideal

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
        for is_first in (True, False):
            programs = record(num_ranks, num_chunks, num_micro_batches, is_first=is_first)
            assert play(programs, costs) > 0


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(2, 3), (2, 9), (3, 3), (4, 4), (4, 6), (4, 9)])
def test_numbers_that_the_stages_do_not_divide_and_small_ones_cost_little(num_ranks, num_micro_batches):
    assert time_over_ideal(num_ranks, 2, num_micro_batches, COSTS) <= 1.02


@pytest.mark.parametrize(
    ("num_ranks", "num_chunks", "num_micro_batches", "counts"),
    [
        (4, 1, 12, [4, 3, 2, 1]),
        (4, 2, 8, [11, 9, 7, 5]),
        (4, 2, 9, [12, 10, 8, 6]),
        (4, 2, 11, [14, 12, 10, 8]),
        (2, 2, 8, [5, 3]),
    ],
)
def test_a_rank_keeps_the_activations_of_few_micro_batches(num_ranks, num_chunks, num_micro_batches, counts):
    programs = record(num_ranks, num_chunks, num_micro_batches)
    assert [count_alive(program) for program in programs] == counts


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
