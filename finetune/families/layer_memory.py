"""What a decoder layer keeps between its forward and its backward pass, as one record for each family.

Counts are of tensors with one row for each token of a micro-batch. They were counted on built models: what Paddle's
allocator holds after a forward pass, for models of several sizes, is a sum of the sizes below with whole numbers in
front of them (docs/memory.md tells them, `tests/families/test_layer_memory.py` counts anew).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerMemory:
    """Tensors that a layer keeps for its backward pass; the defaults are those of `head_decoder`.

    Counts with a fraction stand for tensors that do not grow with the batch, such as tables of angles.

    Attributes:
        hidden: Of hidden size.
        query: As wide as all queries.
        key_value: As wide as all keys.
        inner: As wide as the feed-forward layers inside; of a gated one, as one half. An expert has as many, as wide
            as it is.
        scores: One number for each head and each key that a query could see; none with fused attention.
        norms: RMS norms, each of which keeps its input in float32 where the run is in half precision.
        tables: Tables [positions of the model, head dim] of a layer's own in float32, beside what it keeps.
        cpu: The same record for the layers that CPUs get (`Family.cpu_layers`); None: these.
    """

    hidden: float = 6
    query: float = 4
    key_value: float = 0
    inner: float = 3
    scores: float = 1
    norms: int = 2
    tables: int = 0
    cpu: LayerMemory | None = None

    def on(self, device: str) -> LayerMemory:
        """The record that holds on a device."""
        return self.cpu if self.cpu is not None and device == "cpu" else self


_CHOSEN_HIDDEN = 2
"""Tensors of hidden size that a layer keeps for each expert that a token passes."""
_SHARED_HIDDEN = 1
"""The same for an expert that every token passes."""


def passed_experts(
    layer: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> tuple[int, int] | None:
    """What the experts of a layer come to for a token; None for a layer without any.

    Args:
        layer: Name of the decoder layer.
        shapes: Of all parameters of the model, by name.
        config: Its configuration as the family adapts it.

    Returns:
        The width of all experts that a token passes, and the tensors of hidden size that are kept for them.
    """
    routed = shapes.get(f"{layer}.mlp.experts.0.down_proj.weight")
    if routed is None:
        return None
    num_chosen = int(config.get("num_experts_per_tok") or 1)
    shared = shapes.get(f"{layer}.mlp.shared_expert.down_proj.weight", (0,))[0]
    return num_chosen * routed[0] + shared, _CHOSEN_HIDDEN * num_chosen + (_SHARED_HIDDEN if shared else 0)
