"""The order in which the ranks of a pipeline compute micro-batches and hand them on.

A model is cut into parts, `num_chunks` for each rank: part p is chunk p // num_ranks of rank p % num_ranks
(Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021).
With one chunk this is the 1F1B schedule (Narayanan et al., "PipeDream", 2019): a rank starts as few forward
passes as keep its successors busy, then takes every backward pass as soon as it can, so that activations of at
most num_ranks - rank micro-batches are alive on it.

The order comes from a simulation in which a forward pass takes one unit of time and a backward pass two. Every rank
runs the same simulation and so knows one total order of all computations and transfers. It executes its own
events of that order; because both ends of a transfer agree on what comes before it, blocking sends and receives
cannot wait for each other in a circle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_DURATION = {"forward": 1, "backward": 2}


@dataclass(frozen=True)
class Event:
    """Something a rank does.

    Attributes:
        kind: "forward" or "backward" (compute), "send" or "receive".
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
    events: list[Event] = []
    for task in _run(num_ranks, num_chunks, num_micro_batches):
        if task.part % num_ranks == rank:
            events.append(Event(task.kind, task.part, task.micro_batch))
        events += _transfers(task, num_ranks, num_ranks * num_chunks, rank)
    return events


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


def _run(num_ranks: int, num_chunks: int, num_micro_batches: int) -> Iterator[_Task]:
    """All tasks of all ranks in the order in which the simulation ends them."""
    simulation = _Simulation(num_ranks, num_chunks, num_micro_batches)
    while simulation.unfinished:
        yield from simulation.advance()


class _Simulation:
    def __init__(self, num_ranks: int, num_chunks: int, num_micro_batches: int):
        self.num_ranks, self.num_chunks = num_ranks, num_chunks
        self.num_parts = num_ranks * num_chunks
        self.num_micro_batches = num_micro_batches
        self.unfinished = 2 * self.num_parts * num_micro_batches
        self.time = 0
        self.done: set[_Task] = set()
        self.running: dict[int, tuple[int, _Task]] = {}
        self.alive = [0] * num_ranks
        self.waiting: list[list[_Task]] = [self._forwards(rank) for rank in range(num_ranks)]
        self.backwards: list[list[_Task]] = [[] for _ in range(num_ranks)]

    def _forwards(self, rank: int) -> list[_Task]:
        """A rank's forward passes: chunk after chunk, in groups of as many micro-batches as there are ranks."""
        tasks = [
            _Task("forward", chunk * self.num_ranks + rank, micro_batch)
            for chunk in range(self.num_chunks)
            for micro_batch in range(self.num_micro_batches)
        ]
        return sorted(
            tasks, key=lambda task: (task.micro_batch // self.num_ranks, task.part, task.micro_batch)
        )

    def _limit(self, rank: int) -> int:
        """How many forward passes of a rank may wait for their backward pass."""
        if self.num_chunks == 1:
            return self.num_ranks - rank
        return 2 * (self.num_ranks - rank - 1) + (self.num_chunks - 1) * self.num_ranks + 1

    def advance(self) -> list[_Task]:
        """Starts what can start, lets time pass to the next end, and returns what ended."""
        for rank in range(self.num_ranks):
            self._start(rank)
        if not self.running:  # the limits are a wish; without them there is always something to do
            for rank in range(self.num_ranks):
                self._start(rank, limited=False)
        self.time = min(end for end, _ in self.running.values())
        ended = [(rank, task) for rank, (end, task) in sorted(self.running.items()) if end == self.time]
        for rank, task in ended:
            del self.running[rank]
            self.done.add(task)
            if task.kind == "forward":
                self.backwards[rank].append(_Task("backward", task.part, task.micro_batch))
            else:
                self.alive[rank] -= 1
        self.unfinished -= len(ended)
        return [task for _, task in ended]

    def _start(self, rank: int, *, limited: bool = True) -> None:
        if rank in self.running:
            return
        task = next((each for each in self.backwards[rank] if self._is_ready(each)), None)
        if task is not None:
            self.backwards[rank].remove(task)
        elif self.waiting[rank] and (not limited or self.alive[rank] < self._limit(rank)):
            task = self.waiting[rank][0]
            if not self._is_ready(task):
                return
            self.waiting[rank].pop(0)
            self.alive[rank] += 1
        if task is not None:
            self.running[rank] = (self.time + _DURATION[task.kind], task)

    def _is_ready(self, task: _Task) -> bool:
        if task.kind == "forward":
            return task.part == 0 or _Task("forward", task.part - 1, task.micro_batch) in self.done
        is_last = task.part == self.num_parts - 1
        return is_last or _Task("backward", task.part + 1, task.micro_batch) in self.done
