"""Which kind of replicas a sharding stage means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.parallel.sharding.bucketed_replicas import BucketedReplicas
from finetune.parallel.sharding.fleet_stage1 import OwnedReplicas
from finetune.parallel.sharding.gathered_layers import GatheredReplicas
from finetune.parallel.sharding.replicas import ReplicaOptions, Replicas
from finetune.parallel.sharding.sliced_replicas import SlicedGradientReplicas, SlicedReplicas
from finetune.settings.sharding_words import SLICE_WORDS

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups


def start_replicas(model: Any, groups: ProcessGroups, stage: int, **options: Any) -> Replicas:
    """Prepares a model that holds its weights; must come before the optimizer is made.

    Args:
        model: The paddle Layer whose forward is called; which parameters are trained is final from here on.
        groups: The process groups. With one rank in the sharding group every stage is stage 0.
        stage: Sharding stage, 0 to 3.
        options: Fields of `ReplicaOptions`.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"sharding stage {stage}: 0, 1, 2 and 3 exist")
    chosen = ReplicaOptions(**options)
    kind: type[Replicas]
    if stage == 0 or groups.sharding.size == 1:
        kind = BucketedReplicas if groups.data.size > 1 else Replicas
    elif stage == 1:
        kind = SlicedReplicas if SLICE_WORDS & set(chosen.sharding_words) else OwnedReplicas
    else:
        kind = SlicedGradientReplicas if stage == 2 else GatheredReplicas
    return kind(model, groups, chosen)
