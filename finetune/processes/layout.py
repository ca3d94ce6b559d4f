"""How processes are spread over the four axes of parallelism.

Ranks are numbered as Fleet does it: data, pipeline, sharding, tensor, the last one changing fastest, so that a
tensor-parallel group is a run of neighbouring ranks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

SHARDING_STAGES = {"stage1": 1, "stage2": 2, "stage3": 3}
"""Words of the setting `sharding`: what replicas share out is the optimizer state, gradients too, weights too."""


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands on each axis, counted from 0."""

    data: int
    pipeline: int
    sharding: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Degrees of the four axes.

    Attributes:
        data: Replicas whose optimizer state is not shared.
        pipeline: Stages that hold consecutive layers.
        sharding: Replicas that share out the optimizer state (and, by stage, gradients and weights).
        tensor: Ranks that hold slices of every layer.
    """

    data: int = 1
    pipeline: int = 1
    sharding: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        return (
            f"tensor {self.tensor} x pipeline {self.pipeline} x sharding {self.sharding} x data {self.data}"
        )

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.data * self.pipeline * self.sharding * self.tensor

    @property
    def data_world(self) -> int:
        """Number of ranks that take different samples: replicas of either kind."""
        return self.data * self.sharding

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a global rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, sharding = divmod(rest, self.sharding)
        data, pipeline = divmod(rest, self.pipeline)
        return Coordinates(data, pipeline, sharding, tensor)

    def rank(self, place: Coordinates) -> int:
        """Global rank at a place."""
        return (
            (place.data * self.pipeline + place.pipeline) * self.sharding + place.sharding
        ) * self.tensor + place.tensor

    def data_rank(self, rank: int) -> int:
        """Which share of every global batch a rank takes, in [0, data_world)."""
        place = self.coordinates(rank)
        return place.data * self.sharding + place.sharding


def count_processes() -> int:
    """Number of processes of this run, as the launcher set it; 1 without a launcher."""
    told = os.environ.get("PADDLE_TRAINERS_NUM", "1")
    return int(told) if told.isdecimal() else 1


def split_processes(
    num_processes: int, *, tensor: int, pipeline: int, sharding: int, sharded: bool
) -> Layout | None:
    """Spreads processes over the axes; None when they cannot be shared out evenly.

    Args:
        num_processes: How many there are.
        tensor: Degree; below 1 means 1.
        pipeline: Degree; below 1 means 1.
        sharding: Degree; -1 means all that the other two leave, as in PaddleNLP.
        sharded: Whether anything is sharded at all; else that degree is 1.
    """
    tensor, pipeline = max(tensor, 1), max(pipeline, 1)
    replicas, rest = divmod(num_processes, tensor * pipeline)
    if rest:
        return None
    shards = (replicas if sharding == -1 else max(sharding, 1)) if sharded else 1
    if replicas % shards:
        return None
    return Layout(data=replicas // shards, pipeline=pipeline, sharding=shards, tensor=tensor)
