"""Sums of gradients over replicas, on their way while backward passes go on.

Gradients come in buckets. Where ranks keep slices, a bucket is first summed over the sharding group so that each rank
gets its slices (reduce-scatter), and added to those of the micro-batches before. What the last micro-batch of a step
leaves is summed over the ranks that hold the same (all-reduce): whole gradients at once, slices when they have arrived.

A sum needs a copy of the gradients that it takes. So that copies do not add up to the memory that slices spare, 512 MB
of them are under way at most, about a decoder layer of 7B parameters: beyond that the earliest is waited for. The
order is that in which the sums began, on all ranks, so that it changes no bit when they are waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import paddle

from finetune.parallel.sharding import flat_slices
from finetune.parallel.sharding.flat_slices import cut

if TYPE_CHECKING:
    from finetune.processes.groups import Group

_MOST_BUCKETS_UNDER_WAY = 16


@dataclass
class _Sum:
    """A bucket on its way.

    Attributes:
        names: Of the parameters.
        result: Flat: their gradients, or this rank's slices of them, one after the other.
        task: Of the call that fills it; None where there is none.
        source: What the call reads.
        is_last: Whether no backward pass follows.
    """

    names: tuple[str, ...]
    result: Any
    task: Any = None
    source: Any = None
    is_last: bool = True

    @property
    def num_bytes(self) -> int:
        return int(self.source.size * self.source.element_size())


class GradientSums:
    """Sums that end in the gradients of what this rank updates.

    Args:
        updated: Parameters, or this rank's slices of them, by name.
        sharding: Ranks that each keep their slices; one rank alone keeps whole gradients.
        copies: Ranks that update the same.
        overlaps: Whether sums may be under way; else each is waited for at once.
    """

    def __init__(self, updated: Mapping[str, Any], sharding: Group, copies: Group, *, overlaps: bool = True):
        self._updated, self._sharding, self._copies, self._overlaps = updated, sharding, copies, overlaps
        self._scattered: deque[_Sum] = deque()
        self._totals: dict[tuple[str, ...], Any] = {}
        self._summed: list[_Sum] = []
        self._num_left = 1

    def begin_step(self, num_passes: int) -> None:
        """To be called where every backward pass of a step has sums of its own, with how many follow."""
        self._num_left = num_passes

    def end_pass(self) -> bool:
        """To be called when all sums of a backward pass have begun; whether more passes follow."""
        self._num_left -= 1
        return self._num_left > 0

    def begin(self, names: Sequence[str], gradients: Sequence[Any]) -> None:
        """Begins the sum of some parameters' gradients, which are of one dtype and may be given up."""
        size = self._sharding.size
        pieces = [cut(gradient, size) for gradient in gradients]  # [size, n] each
        # Always new memory: a backward pass may use a gradient's elsewhere still, and sums are written in place.
        source = (pieces[0].clone() if len(pieces) == 1 else paddle.concat(pieces, axis=1)).flatten()
        begun = _Sum(tuple(names), source, source=source, is_last=self._num_left <= 1)
        if size == 1:
            self._add(begun)
            return
        begun.result = paddle.empty([source.size // size], dtype=source.dtype)
        begun.task = self._sharding.begin_reduce_scatter(begun.result, source)
        self._scattered.append(begun)
        while self._must_take():
            self._take()

    def finish(self) -> None:
        """Returns when the gradients hold all that has begun."""
        while self._scattered:
            self._take()
        while self._totals:
            names = next(iter(self._totals))
            self._add(_Sum(names, self._totals.pop(names)))
        for done in self._summed:
            if done.task:
                done.task.wait()
            targets = [self._updated[name] for name in done.names]
            # Copies: a gradient must not keep the memory of the whole bucket.
            parts = paddle.split(done.result, [target.size for target in targets])
            for target, part in zip(targets, parts, strict=True):
                if target.grad is None:
                    target.grad = part.reshape(target.shape)
                else:
                    target.grad.add_(part.reshape(target.shape))
        self._summed.clear()

    def _must_take(self) -> bool:
        if not self._overlaps:
            return bool(self._scattered)
        num_bytes = sum(each.num_bytes for each in self._scattered)
        return len(self._scattered) > 1 and num_bytes > _MOST_BUCKETS_UNDER_WAY * flat_slices.BUCKET_BYTES

    def _take(self) -> None:
        arrived = self._scattered.popleft()
        arrived.task.wait()
        self._add(arrived)

    def _add(self, arrived: _Sum) -> None:
        """Adds to what earlier micro-batches left; after the last, begins the sum over equal replicas."""
        total = self._totals.pop(arrived.names, None)
        total = arrived.result if total is None else total.add_(arrived.result)
        if not arrived.is_last:
            self._totals[arrived.names] = total
            return
        task = self._copies.begin_all_reduce(total) if self._copies.size > 1 else None
        if task and not self._overlaps:
            task.wait()
        self._summed.append(_Sum(arrived.names, total, task))
