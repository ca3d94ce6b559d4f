"""Which kind of replicas a sharding stage means."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from finetune.parallel.sharding.bucketed_replicas import BucketedReplicas
from finetune.parallel.sharding.fleet_stage1 import OwnedReplicas
from finetune.parallel.sharding.gathered_layers import GatheredReplicas
from finetune.parallel.sharding.replicas import Replicas
from finetune.parallel.sharding.sliced_replicas import SlicedGradientReplicas, SlicedReplicas
from finetune.settings.sharding_words import SLICE_WORDS

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups


def start_replicas(
    model: Any,
    groups: ProcessGroups,
    stage: int,
    *,
    layers: Sequence[Any] = (),
    master_gradients: bool = False,
    overlaps: bool = True,
    sharding_words: Collection[str] = (),
    shared: Collection[str] = (),
) -> Replicas:
    """Prepares a model that holds its weights; must come before the optimizer is made.

    Args:
        model: The paddle Layer whose forward is called; which parameters are trained is final from here on.
        groups: The process groups. With one rank in the sharding group every stage is stage 0.
        stage: Sharding stage, 0 to 3.
        layers: Its decoder layers.
        master_gradients: Whether gradients are added up in float32 whatever the parameters' dtype.
        overlaps: Whether ranks exchange gradients and weights while they compute, where the engine can.
        sharding_words: Of the setting `sharding_parallel_config`; some give each rank a slice of every parameter at
            stage 1, in the place of whole parameters.
        shared: Names of weights that several stages of a pipeline hold.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"sharding stage {stage}: 0, 1, 2 and 3 exist")
    if stage == 0 or groups.sharding.size == 1:
        if groups.data.size == 1:
            return Replicas(model, groups, master_gradients=master_gradients)
        return BucketedReplicas(model, groups, master_gradients=master_gradients, overlaps=overlaps)
    if stage == 1 and not SLICE_WORDS & set(sharding_words):
        return OwnedReplicas(
            model, groups, master_gradients=master_gradients, shared=shared, words=sharding_words
        )
    kind = {1: SlicedReplicas, 2: SlicedGradientReplicas, 3: GatheredReplicas}[stage]
    return kind(model, groups, layers=layers, master_gradients=master_gradients, overlaps=overlaps)
