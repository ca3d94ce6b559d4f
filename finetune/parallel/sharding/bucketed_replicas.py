"""Plain replicas: every rank holds everything, gradients are summed beside the last backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.parallel.sharding.gradient_buckets import GradientBuckets
from finetune.parallel.sharding.replicas import Replicas

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups


class BucketedReplicas(Replicas):
    """Stage 0 with several replicas.

    Args:
        model: The Layer whose forward is called.
        groups: The process groups.
        master_gradients: Whether gradients are added up in float32 whatever the parameters' dtype.
        overlaps: Whether sums begin before the backward passes are over.
    """

    def __init__(
        self, model: Any, groups: ProcessGroups, *, master_gradients: bool = False, overlaps: bool = True
    ):
        super().__init__(model, groups, master_gradients=master_gradients)
        self.buckets = GradientBuckets(self.trained, self._local, groups.data, overlaps=overlaps)
        self._overlaps = overlaps

    def engine(self, axis: str) -> str:
        """What drives the axis "data", and whether it waits for all backward passes."""
        return super().engine(axis) + ("" if self._overlaps else " after all passes")

    def begin_step(self, num_micro_batches: int) -> None:
        """To be called before the first forward pass of a step."""
        self.buckets.begin_step(num_micro_batches)

    def sum_gradients(self) -> None:
        """Sums the gradients over all replicas; a rank without one counts as zero."""
        self._seen |= self.buckets.finish()
