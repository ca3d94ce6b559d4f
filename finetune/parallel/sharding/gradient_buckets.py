"""Buckets of gradients whose sums begin while the last backward pass still computes.

Trained parameters are put into buckets of about 32 MB in the reverse of the model's order, which is about the order in
which a backward pass has their gradients. A hook of each parameter counts how often a backward pass gave it a gradient;
when all of a bucket have theirs of the step's last micro-batch, the bucket's sum begins, and the next backward
operators run beside it. Buckets begin in one order on all ranks; what never gets a gradient holds up its bucket, and
those behind it, until the backward passes are over.

How many gradients a parameter gets in a step follows from the step before: c for each of m micro-batches, in whichever
order a pipeline computes them. In the first step nothing is known, and all sums begin at the end. Where the count
differs from one micro-batch to the next, as for an expert without tokens, the parameter is waited for until the end.
Paddle's own reducer of this kind (`paddle.DataParallel`) takes process groups written in C++ only and finds parameters
ready twice under reentrant recomputation; docs/parallel.md tells what was tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from finetune.errors import RunError
from finetune.parallel.sharding.flat_slices import no_grad_no_autocast, plan_buckets

if TYPE_CHECKING:
    from finetune.parallel.sharding.local_gradients import ParameterGradients


class ArrivalCounts:
    """How often backward passes gave each parameter a gradient, and which of them must be the last of a step.

    Args:
        names: Of the parameters.
    """

    def __init__(self, names: Iterable[str]):
        self._counts = dict.fromkeys(names, 0)
        self._per_micro_batch: dict[str, int] = {}
        self._num_micro_batches = 0

    def begin_step(self, num_micro_batches: int) -> None:
        """Learns from the step that is over.

        Args:
            num_micro_batches: Of the step that begins, on this rank.
        """
        if self._num_micro_batches and any(
            self._counts.values()
        ):  # not by a rank that had nothing to compute
            for name, count in self._counts.items():
                each, rest = divmod(count, self._num_micro_batches)
                self._per_micro_batch[name] = 0 if rest else each
        self._counts = dict.fromkeys(self._counts, 0)
        self._num_micro_batches = num_micro_batches

    def note(self, name: str) -> bool:
        """Counts a gradient; whether it is the last of the step, as far as is known."""
        self._counts[name] += 1
        return self._counts[name] == self._per_micro_batch.get(name, 0) * self._num_micro_batches


class Sums(Protocol):
    """Takes buckets of gradients."""

    def begin(self, names: Sequence[str], gradients: Sequence[Any]) -> None:
        """Begins the sum of some parameters' flat gradients, which are of one dtype and may be given up."""

    def finish(self) -> None:
        """Returns when all that has begun is where the optimizer looks."""


class GradientBuckets:
    """Begins the sums of gradients, early where they are complete.

    Args:
        parameters: Trained ones by name, in the model's order; each gets a hook for good.
        local: Where backward passes leave their gradients.
        sums: Take the buckets.
        overlaps: Whether sums begin before the backward passes are over; the bits are the same either way.
        max_bytes: Of a bucket, unless a single tensor has more; None: as elsewhere.

    Attributes:
        num_early: Buckets of the last step whose sum began before `finish`.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        local: ParameterGradients,
        sums: Sums,
        *,
        overlaps: bool = True,
        max_bytes: int | None = None,
    ):
        self._parameters, self._local, self._sums = parameters, local, sums
        self._overlaps = overlaps
        names = list(parameters)[::-1]
        planned = plan_buckets([parameters[name] for name in names], max_bytes)
        self._buckets = [[names[place] for place in places] for places in planned]
        self._place = {name: number for number, bucket in enumerate(self._buckets) for name in bucket}
        self._awaited: list[set[str]] = []
        self._arrivals = ArrivalCounts(names)
        self._present: set[str] = set()
        self._late: list[str] = []
        self._num_begun = 0
        self.num_early = 0
        self.begin_step(0)
        for name, parameter in parameters.items():
            parameter._register_backward_hook(self._make_hook(name))

    def begin_step(self, num_micro_batches: int) -> None:
        """To be called before the first forward pass of a step.

        Args:
            num_micro_batches: How many of them this rank will compute.
        """
        self._arrivals.begin_step(num_micro_batches)
        self._num_begun = 0
        self._late.clear()
        self._awaited = [set(bucket) for bucket in self._buckets]

    def finish(self) -> set[str]:
        """Leaves the sums where the optimizer looks; a gradient that this rank lacks counts as zero.

        Returns:
            Names of the parameters for which this rank had a gradient.
        """
        self.begin_rest()
        return self.take()

    def begin_rest(self) -> None:
        """Begins all sums of the step that have not begun."""
        if self._late:
            raise RunError(
                f"{self._late[0]} got a gradient after the sum of its gradients over the replicas had begun: this step "
                "uses it more often than the step before did. Continue with --data_parallel_config "
                "gradient_sync_after_accumulate, with which sums wait for all backward passes"
            )
        self.num_early = self._num_begun
        with no_grad_no_autocast():
            while self._num_begun < len(self._buckets):
                self._begin_next()

    def take(self) -> set[str]:
        """Waits for all sums that have begun; what it leaves and returns is that of `finish`."""
        with no_grad_no_autocast():
            self._sums.finish()
        present, self._present = self._present, set()
        self._num_begun = 0
        return present

    def _make_hook(self, name: str) -> Callable[[], None]:
        def note() -> None:
            if self._place[name] < self._num_begun:
                self._late.append(name)
            if self._arrivals.note(name) and self._overlaps:
                self._awaited[self._place[name]].discard(name)
                self._begin_complete()

        return note

    def _begin_complete(self) -> None:
        """Begins the sums of the next buckets that await nothing."""
        with no_grad_no_autocast():
            while self._num_begun < len(self._buckets) and not self._awaited[self._num_begun]:
                self._begin_next()

    def _begin_next(self) -> None:
        names = self._buckets[self._num_begun]
        gradients, present = self._local.take({name: self._parameters[name] for name in names})
        self._present |= present
        self._num_begun += 1
        self._sums.begin(names, gradients)
