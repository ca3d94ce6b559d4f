"""The order in which the ranks of a pipeline compute micro-batches and hand them on.

A model is cut into parts, `num_chunks` for each rank: part p is chunk p // num_ranks of rank p % num_ranks
(Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021). A rank
goes through its chunks with groups of as many micro-batches as there are ranks. It begins with as many forward passes
as keep its successors busy, and from then on takes a forward and a backward pass in turn (1F1B: Narayanan et al.,
"PipeDream", 2019). With m micro-batches, p ranks and v chunks a step takes (m + (p - 1) / v) times a micro-batch's
passes where p divides m. A last group that is smaller has gaps where the micro-batches are missing.

Transfers run beside the computing. Every rank works out the same timetable, in which a forward pass takes one unit of
time and a backward pass two, and begins the transfers with each of its neighbours in the order of their times in it.
So both ends of a link agree on what comes next, and no two ranks can wait for each other in a circle. A rank asks
for what arrives during a pass before that pass.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

_DURATION = {"forward": 1, "backward": 2}


@dataclass(frozen=True)
class Event:
    """Something a rank does.

    Attributes:
        kind: "forward" or "backward" (compute), "send" or "receive" (begin a transfer; computing waits for its end).
        part: The part of the model that computes; of a transfer, the part that computes the tensor next.
        micro_batch: Counted from 0.
        of: For transfers, what is handed on: hidden states ("forward") or their gradient ("backward").
        peer: For transfers, the other rank.
    """

    kind: str
    part: int
    micro_batch: int
    of: str = ""
    peer: int = -1


@dataclass(frozen=True)
class _Task:
    """A pass of a part for a micro-batch."""

    kind: str
    part: int
    micro_batch: int


def schedule(num_ranks: int, num_chunks: int, num_micro_batches: int, rank: int) -> list[Event]:
    """The events of one rank, in order.

    Args:
        num_ranks: Pipeline-parallel degree.
        num_chunks: Parts of the model on each rank (virtual stages); 1 for none.
        num_micro_batches: Of this step; any number.
        rank: Whose events.
    """
    orders = [_passes(num_ranks, num_chunks, num_micro_batches, each) for each in range(num_ranks)]
    ends = _timetable(orders, num_ranks * num_chunks)
    own, place_of = orders[rank], {task: place for place, task in enumerate(orders[rank])}
    own_ends = [ends[task] for task in own]
    before: list[list[Event]] = [[] for _ in range(len(own) + 1)]  # transfers, by the place of the next pass
    places: dict[int, int] = {}
    for task in sorted(ends, key=lambda task: (ends[task], task.kind, task.part, task.micro_batch)):
        for event in _transfers(task, num_ranks, num_ranks * num_chunks, rank):
            # What arrives is asked for before the pass that runs, or comes next, at that time.
            earliest = place_of[task] + 1 if event.kind == "send" else bisect_left(own_ends, ends[task])
            place = places[event.peer] = max(earliest, places.get(event.peer, 0))
            before[place].append(event)
    events: list[Event] = []
    for transfers, pass_ in zip_longest(before, own):
        events += transfers
        if pass_:
            events.append(Event(pass_.kind, pass_.part, pass_.micro_batch))
    return events


def _passes(num_ranks: int, num_chunks: int, num_micro_batches: int, rank: int) -> list[_Task]:
    """A rank's passes in order.

    The order is that of whole groups, without the micro-batches that the last group lacks.
    """
    num_groups = -(-num_micro_batches // num_ranks) if num_chunks > 1 else num_micro_batches
    group_size = num_ranks if num_chunks > 1 else 1
    steps = [
        (chunk, group * group_size + member)
        for group in range(num_groups)
        for chunk in range(num_chunks)
        for member in range(group_size)
    ]
    forwards = [_Task("forward", chunk * num_ranks + rank, number) for chunk, number in steps]
    last = num_chunks - 1
    backwards = [_Task("backward", (last - chunk) * num_ranks + rank, number) for chunk, number in steps]
    num_ahead = num_ranks - rank - 1
    if num_chunks > 1:
        num_ahead = 2 * num_ahead + last * num_ranks
    tasks = forwards[:num_ahead]
    for forward, backward in zip_longest(forwards[num_ahead:], backwards):
        tasks += [each for each in (forward, backward) if each]
    return [task for task in tasks if task.micro_batch < num_micro_batches]


def _timetable(orders: list[list[_Task]], num_parts: int) -> dict[_Task, int]:
    """When each pass ends where every rank keeps its order and begins as early as it can."""
    ends: dict[_Task, int] = {}
    places, clocks = [0] * len(orders), [0] * len(orders)
    while len(ends) < sum(map(len, orders)):
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                task = order[places[rank]]
                needed = _needed_by(task, num_parts)
                if needed is not None and needed not in ends:
                    break
                begin = max(clocks[rank], ends[needed] if needed else 0)
                clocks[rank] = ends[task] = begin + _DURATION[task.kind]
                places[rank] += 1
    return ends


def _needed_by(task: _Task, num_parts: int) -> _Task | None:
    """The pass whose result another one takes."""
    if task.kind == "forward":
        return _Task("forward", task.part - 1, task.micro_batch) if task.part else None
    if task.part == num_parts - 1:
        return _Task("forward", task.part, task.micro_batch)
    return _Task("backward", task.part + 1, task.micro_batch)


def _transfers(task: _Task, num_ranks: int, num_parts: int, rank: int) -> Iterator[Event]:
    """The handing on of what a task computed, as far as it concerns a rank."""
    target = task.part + 1 if task.kind == "forward" else task.part - 1
    if not 0 <= target < num_parts:
        return
    source_rank, target_rank = task.part % num_ranks, target % num_ranks
    if rank == source_rank:
        yield Event("send", target, task.micro_batch, task.kind, target_rank)
    if rank == target_rank:
        yield Event("receive", target, task.micro_batch, task.kind, source_rank)
