"""How the feed-forward layers of a decoder are divided into experts, in one record; the layers are in `experts`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertFacts:
    """The experts of a decoder, Shazeer et al. 2017: each token passes the few that its router prefers.

    Attributes:
        num_routed: Of each layer that has experts.
        num_chosen: Experts that a token passes.
        inner_size: Width between the two halves of an expert.
        normalised: Whether the shares of a token's experts are divided by their sum.
        shared_size: The same width of an expert that every token passes beside them, behind a gate of its own; None:
            there is none.
        sparse_step: Every so many layers one has experts, the last of each run of that length.
        dense_layers: Numbers of further layers without experts.
    """

    num_routed: int
    num_chosen: int
    inner_size: int
    normalised: bool = False
    shared_size: int | None = None
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, by its number in the whole model, has experts."""
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0

    def linear_layers(self) -> Iterable[str]:
        """Names of the linear layers of a layer with experts, inside its feed-forward layer."""
        yield "gate"
        parts = [f"experts.{number}" for number in range(self.num_routed)]
        if self.shared_size:
            yield "shared_expert_gate"
            parts.append("shared_expert")
        for part in parts:
            yield from (f"{part}.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
