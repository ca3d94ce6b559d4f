"""Gradient sums of which each rank keeps its slices, on their way while backward passes go on.

A reduce-scatter needs a copy of the gradients that it sums. So that these copies do not add up to the memory that
slices spare, 512 MB of them are under way at most, about a decoder layer of 7B parameters: beyond that the earliest is
waited for. They are added to the slices' gradients in the order in which they began, so that it changes no bit when
that is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.parallel.sharding import flat_slices
from finetune.parallel.sharding.flat_slices import ScatteredSums
from finetune.parallel.sharding.gradient_buckets import Bucket, GradientBuckets

if TYPE_CHECKING:
    from finetune.parallel.sharding.local_gradients import MasterGradients, ParameterGradients
    from finetune.processes.groups import Group

_MOST_BUCKETS_UNDER_WAY = 16


class SliceSums:
    """Sums over a group that end in the gradients of slices.

    Args:
        slices: By the name of the parameter.
        group: The sharding group.
        overlaps: Whether sums may be under way; else each is waited for at once.
    """

    def __init__(self, slices: Mapping[str, Any], group: Group, *, overlaps: bool = True):
        self._slices, self._group = slices, group
        self._most_bytes = _MOST_BUCKETS_UNDER_WAY * flat_slices.BUCKET_BYTES if overlaps else 0
        self._begun: deque[tuple[Sequence[str], ScatteredSums]] = deque()
        self._num_bytes = 0

    def begin(self, names: Sequence[str], gradients: Sequence[Any]) -> None:
        """Begins the sum of some parameters' gradients, which are of one dtype and may be given up."""
        sums = ScatteredSums(gradients, self._group)
        self._begun.append((names, sums))
        self._num_bytes += sums.num_bytes
        while self._num_bytes > self._most_bytes and len(self._begun) > bool(self._most_bytes):
            self._take()

    def finish(self) -> None:
        """Returns when the slices' gradients hold all that has begun."""
        while self._begun:
            self._take()

    def _take(self) -> None:
        names, sums = self._begun.popleft()
        self._num_bytes -= sums.num_bytes
        for name, part in zip(names, sums.wait(), strict=True):
            piece = self._slices[name]
            if piece.grad is None:
                piece.grad = part
            else:
                piece.grad.add_(part)


class SliceBuckets(GradientBuckets):
    """Gradients that are summed over a sharding group as soon as a bucket of them is complete.

    Args:
        parameters: Trained ones by name, in the model's order.
        local: Where backward passes leave their gradients.
        group: The sharding group.
        sums: Take the buckets.
        overlaps: Whether sums begin before a backward pass is over.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        local: ParameterGradients | MasterGradients,
        group: Group,
        *,
        sums: SliceSums,
        overlaps: bool = True,
    ):
        super().__init__(parameters, local, group, overlaps=overlaps)
        self._sums = sums

    def _begin_sum(self, bucket: Bucket, gradients: Sequence[Any]) -> None:
        self._sums.begin(bucket.names, gradients)

    def _take_sums(self) -> None:
        self._sums.finish()
