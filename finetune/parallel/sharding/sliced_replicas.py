"""Replicas that update slices of every parameter: stages 1 and 2, and what stage 3 has in common with them.

Slices are flat (`flat_slices.py`), which suits optimizers that treat every element alike, as AdamW does, and equal for
all ranks. A slice is a Parameter itself, so that moments and float32 master weights are made for it as for any other.
Slices are copies: weights take (1 + 1/s) of their size at stages 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import paddle
from paddle.base.framework import EagerParamBase
from paddle.utils import unique_name

from finetune.parallel.sharding.flat_slices import GatheredTensors, cut, no_grad_no_autocast
from finetune.parallel.sharding.gradient_buckets import GradientBuckets
from finetune.parallel.sharding.gradient_sums import GradientSums
from finetune.parallel.sharding.replicas import DEFAULTS, ReplicaOptions, Replicas
from finetune.parallel.sharding.updated_weights import UpdatedWeights

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups


class SliceHolders(Replicas):
    """Each rank of the sharding group updates its slice of every trained parameter."""

    def __init__(self, model: Any, groups: ProcessGroups, options: ReplicaOptions = DEFAULTS):
        super().__init__(model, groups, options)
        self._slices = {name: self._new_slice(name, parameter) for name, parameter in self.trained.items()}
        self._sums = GradientSums(self._slices, groups.sharding, groups.replicas, overlaps=options.overlaps)

    def slice_of(self, name: str, whole: Any) -> Any:
        """This rank's slice [n] of a tensor that has a parameter's shape."""
        group = self.groups.sharding
        with no_grad_no_autocast():
            return cut(whole, group.size)[group.position].clone()

    def whole_of(self, name: str, part: Any) -> Any:
        """The tensor, of the parameter's shape, of which the ranks of the sharding group hold slices [n]."""
        with no_grad_no_autocast():
            return GatheredTensors([part], [self._shapes[name]], self.groups.sharding).wait()[0]

    def _updated(self) -> dict[str, Any]:
        return self._slices

    def _new_slice(self, name: str, parameter: Any) -> Any:
        part = self.slice_of(name, parameter)
        piece = EagerParamBase(shape=part.shape, dtype=part.dtype, name=unique_name.generate(f"{name}@slice"))
        part._share_buffer_to(piece)
        piece.optimize_attr = dict(parameter.optimize_attr)
        piece.regularizer = parameter.regularizer
        return piece


class SlicedReplicas(SliceHolders):
    """Stage 1 in slices: gradients are summed beside the last backward pass."""

    stage = 1
    buckets: GradientBuckets

    def __init__(self, model: Any, groups: ProcessGroups, options: ReplicaOptions = DEFAULTS):
        super().__init__(model, groups, options)
        self.buckets = GradientBuckets(self.trained, self._local, self._sums, overlaps=options.overlaps)
        self.weights = UpdatedWeights(
            model, options.layers, self._slices, groups.sharding, overlaps=options.overlaps
        )

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Takes changes of the parameters over into the slices when it ends."""
        self.finish_updates()
        yield
        for name, parameter in self.trained.items():
            paddle.assign(self.slice_of(name, parameter), output=self._slices[name])

    def after_update(self) -> None:
        """Begins to put the updated slices of all ranks together in the parameters."""
        self.weights.begin()

    def finish_updates(self) -> None:
        """Returns when the parameters hold the updated slices of all ranks."""
        self.weights.finish()


class SlicedGradientReplicas(SlicedReplicas):
    """Stage 2: whole gradients live only until the end of their micro-batch's backward pass, or a little longer."""

    stage = 2

    def begin_step(self, num_micro_batches: int) -> None:
        """To the buckets, every backward pass is a step."""
        self._sums.begin_step(num_micro_batches * self._options.num_parts)
        self.buckets.begin_step(1)

    def after_micro_batch(self) -> None:
        """Begins those sums of the micro-batch's gradients that its backward pass has not begun."""
        self.buckets.begin_rest()
        if self._sums.end_pass():
            self.buckets.begin_step(1)
