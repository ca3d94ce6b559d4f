"""What a decoder layer keeps between its forward and its backward pass, as one record for each family.

Counts are of tensors with one row for each token of a micro-batch. They were counted on built models: what Paddle's
allocator holds after a forward pass, for models of several sizes, is a sum of the sizes below with whole numbers in
front of them (docs/memory.md tells them, `tests/families/test_layer_memory.py` counts anew).
"""

from __future__ import annotations

from dataclasses import dataclass


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


CHOSEN_HIDDEN = 2
"""Tensors of hidden size that a layer keeps for each expert that a token passes."""
SHARED_HIDDEN = 1
"""The same for an expert that every token passes."""
