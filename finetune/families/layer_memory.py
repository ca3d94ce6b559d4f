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

    Attributes:
        hidden: Of hidden size.
        query: As wide as all queries.
        key_value: As wide as all keys.
        inner: As wide as the feed-forward layers inside; of a gated one, as one half.
        scores: One number for each head and each key that a query could see; none with fused attention.
        wide: Of `hidden`, those in float32 whatever the type of the run, with copies that only half precision has.
        wide_query: The same of `query`.
        wide_key_value: The same of `key_value`.
        cpu: The same record for the layers that CPUs get (`Family.cpu_layers`); None: these.
    """

    hidden: float = 6
    query: float = 4
    key_value: float = 0
    inner: float = 3
    scores: float = 1
    wide: float = 2
    wide_query: float = 0
    wide_key_value: float = 0
    cpu: LayerMemory | None = None
