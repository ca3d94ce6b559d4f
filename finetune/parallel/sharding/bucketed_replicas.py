"""Plain replicas: every rank holds everything, gradients are summed beside the last backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.parallel.sharding.gradient_buckets import GradientBuckets
from finetune.parallel.sharding.gradient_sums import GradientSums
from finetune.parallel.sharding.replicas import DEFAULTS, ReplicaOptions, Replicas
from finetune.processes.groups import Group

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups


class BucketedReplicas(Replicas):
    """Stage 0 with several replicas."""

    def __init__(self, model: Any, groups: ProcessGroups, options: ReplicaOptions = DEFAULTS):
        super().__init__(model, groups, options)
        sums = GradientSums(self.trained, Group(), groups.data, overlaps=options.overlaps)
        self.buckets = GradientBuckets(self.trained, self._local, sums, overlaps=options.overlaps)

    def engine(self, axis: str) -> str:
        """What drives the axis "data", and whether it waits for all backward passes."""
        return super().engine(axis) + ("" if self._options.overlaps else " after all passes")
