"""Which part of a model each rank of a pipeline holds, told without Paddle."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StagePlan:
    """Which part of a model a pipeline rank holds.

    Attributes:
        rank: Of the pipeline.
        num_ranks: Pipeline-parallel degree.
        num_chunks: Parts per rank (virtual stages).
    """

    rank: int = 0
    num_ranks: int = 1
    num_chunks: int = 1

    @property
    def num_parts(self) -> int:
        """Parts of the whole model."""
        return self.num_ranks * self.num_chunks

    @property
    def holds_first(self) -> bool:
        """Whether the embedding is here."""
        return self.rank == 0

    @property
    def holds_last(self) -> bool:
        """Whether the output layer is here."""
        return self.rank == self.num_ranks - 1

    def layers(self, num_layers: int) -> list[range]:
        """Numbers of the decoder layers of each chunk; parts differ by one layer at most."""
        each, more = divmod(num_layers, self.num_parts)
        starts = [part * each + min(part, more) for part in range(self.num_parts + 1)]
        parts = range(self.rank, self.num_parts, self.num_ranks)
        return [range(starts[part], starts[part + 1]) for part in parts]
