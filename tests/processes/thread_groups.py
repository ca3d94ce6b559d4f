"""Process groups whose ranks are threads of one process, for code that only gathers, sends and receives."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.processes.groups import Group, ProcessGroups
from finetune.processes.layout import Layout

TIMEOUT = 30


class _Exchange:
    """What the ranks of one group hand to each other."""

    def __init__(self, size: int):
        self.boxes = {(a, b): queue.Queue() for a in range(size) for b in range(size)}


class _Done:
    def wait(self) -> None:
        pass


@dataclass(frozen=True)
class ThreadGroup(Group):
    """A group of threads; `handle` is their exchange."""

    def gather_objects(self, value: Any) -> list[Any]:
        for other in range(self.size):
            self.handle.boxes[self.position, other].put(value)
        return [self.handle.boxes[other, self.position].get(timeout=TIMEOUT) for other in range(self.size)]

    def all_reduce_numbers(self, values: Sequence[float], op: str = "sum") -> list[float]:
        reduction = {"sum": sum, "max": max}[op]
        return [reduction(column) for column in zip(*self.gather_objects(list(values)), strict=True)]

    def all_gather(self, tensor: Any) -> list[Any]:
        import paddle

        return [paddle.to_tensor(array) for array in self.gather_objects(tensor.numpy())]

    def begin_all_gather(self, output: Any, tensor: Any) -> Any:
        import paddle

        output.set_value(paddle.concat(self.all_gather(tensor)))
        return _Done()

    def broadcast(self, tensor: Any, source: int = 0) -> None:
        import paddle

        values = self.gather_objects(tensor.numpy() if self.position == source else None)
        paddle.assign(paddle.to_tensor(values[source]), output=tensor)

    def barrier(self) -> None:
        self.gather_objects(None)

    def send(self, tensor: Any, to: int) -> None:
        self.handle.boxes[self.position, to].put(tensor.numpy().copy())

    def receive(self, tensor: Any, source: int) -> None:
        import paddle

        tensor.set_value(paddle.to_tensor(self.handle.boxes[source, self.position].get(timeout=TIMEOUT)))


def run_ranks(layout: Layout, work: Callable[[ProcessGroups], Any]) -> list[Any]:
    """Runs `work` once per rank, in threads; returns what each returned, or the exception it raised."""
    exchanges: dict[tuple, _Exchange] = {}
    results: list[Any] = [None] * layout.world

    def run(rank: int) -> None:
        try:
            results[rank] = work(_groups(layout, rank, exchanges))
        except Exception as error:
            results[rank] = error

    groups = [_groups(layout, rank, exchanges) for rank in range(layout.world)]  # makes all exchanges
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT)
        assert not thread.is_alive(), "a rank hangs"
    return results


def _groups(layout: Layout, rank: int, exchanges: dict[tuple, _Exchange]) -> ProcessGroups:
    place = vars(layout.coordinates(rank))

    def group(name: str, *free: str) -> Group:
        ranks = tuple(
            other
            for other in range(layout.world)
            if all(
                place[axis] == value
                for axis, value in vars(layout.coordinates(other)).items()
                if axis not in free
            )
        )
        if len(ranks) == 1:
            return Group(ranks)
        exchange = exchanges.setdefault((name, ranks), _Exchange(len(ranks)))
        return ThreadGroup(ranks, ranks.index(rank), exchange)

    return ProcessGroups(
        layout=layout,
        rank=rank,
        world=group("world", "data", "pipeline", "sharding", "tensor"),
        tensor=group("tensor", "tensor"),
        pipeline=group("pipeline", "pipeline"),
        sharding=group("sharding", "sharding"),
        replicas=group("replicas", "data"),
        data=group("data", "data", "sharding"),
        model=group("model", "pipeline", "tensor"),
    )
