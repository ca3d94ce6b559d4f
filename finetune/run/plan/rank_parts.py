"""Which parameters each rank of a layout holds, worked out from their shapes in one process."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.adapters.trained_shapes import PREFIX_NAME, TrainedShapes, number_of
from finetune.families.family import Family
from finetune.families.tensor_splits import find_split
from finetune.models.hf_names import embedding_name, is_tied
from finetune.parallel.pipe.stage_plan import StagePlan
from finetune.processes.layout import Layout


@dataclass(frozen=True)
class StageParts:
    """What the ranks of one pipeline stage hold.

    Attributes:
        plan: Which stage.
        chunks: Numbers of the decoder layers of each of its chunks.
        sizes: Elements of each parameter on one tensor rank.
        trained: Names of those that are trained.
        shared: Names of those that other stages hold as well.
    """

    plan: StagePlan
    chunks: list[range]
    sizes: Mapping[str, int]
    trained: frozenset[str]
    shared: frozenset[str]

    @property
    def num_parameters(self) -> int:
        """All elements that a rank holds."""
        return sum(self.sizes.values())

    @property
    def num_trained(self) -> int:
        """Those of them that are trained."""
        return sum(self.sizes[name] for name in self.trained)

    @property
    def num_layers(self) -> int:
        """Decoder layers of all its chunks."""
        return sum(map(len, self.chunks))


def divide_parameters(
    shapes: TrainedShapes, family: Family, config: Mapping[str, Any], layout: Layout, *, num_chunks: int = 1
) -> list[StageParts]:
    """The parts of all pipeline stages, in order.

    Args:
        shapes: Parameters in one process, and which are trained.
        family: Record of the model.
        config: Its configuration as the family adapts it, with the vocabulary's size as in the run.
        layout: Degrees of parallelism.
        num_chunks: Parts of each stage (virtual stages).
    """
    num_layers = int(config[family.fields.num_layers])
    local = {
        name: _local_size(name, number_of(shape), family, config, layout.tensor)
        for name, shape in shapes.all.items()
    }
    plans = [StagePlan(rank, layout.pipeline, num_chunks) for rank in range(layout.pipeline)]
    held = [_names_of(plan, local, family, config, plan.layers(num_layers)) for plan in plans]
    parts = []
    for plan, names in zip(plans, held, strict=True):
        others = set().union(*(each for each in held if each is not names))
        parts.append(
            StageParts(
                plan=plan,
                chunks=plan.layers(num_layers),
                sizes={name: local[name] for name in local if name in names},
                trained=shapes.updated & names,
                shared=frozenset(names & others),
            )
        )
    return parts


@functools.cache
def layer_number(name: str) -> int | None:
    """The decoder layer that a parameter is in; None for one outside of them."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _local_size(name: str, size: int, family: Family, config: Mapping[str, Any], degree: int) -> int:
    if degree == 1 or name == PREFIX_NAME or find_split(family, name, config, degree=degree) is None:
        return size
    return size // degree


def _names_of(
    plan: StagePlan,
    names: Mapping[str, int],
    family: Family,
    config: Mapping[str, Any],
    chunks: list[range],
) -> frozenset[str]:
    own = {number for chunk in chunks for number in chunk}
    entries = {*family.entry_modules, family.embedding_module}
    tied = embedding_name(family) if is_tied(config, family) else ""
    found = set()
    for name in names:
        number = None if name == PREFIX_NAME else layer_number(name)
        if number is not None:
            is_own = number in own
        elif name == PREFIX_NAME:
            is_own = True
        elif entries & set(name.split(".")):
            is_own = plan.holds_first or (plan.holds_last and name == tied)
        else:
            is_own = plan.holds_last
        if is_own:
            found.add(name)
    return frozenset(found)
