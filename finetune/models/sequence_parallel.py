"""Rows of any length under sequence parallelism.

With `sequence_parallel` the activations between tensor-parallel layers are divided over the tensor-parallel ranks
along the tokens (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022).
PaddleNLP's layers then keep hidden states as [tokens of the batch / ranks, hidden] and restore the rows from a fixed
`seq_length`, in the configuration and in every attention layer; batches here are as long as their longest row.
"""

from __future__ import annotations

from typing import Any


def set_row_length(model: Any, length: int) -> None:
    """Tells a model how long the rows of the next batch are; `length` must be a multiple of the tensor degree."""
    if not getattr(model.config, "sequence_parallel", False):
        return
    model.config.seq_length = length
    for layer in model.sublayers():
        if "seq_length" in layer.__dict__:
            layer.seq_length = length
