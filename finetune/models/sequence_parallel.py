"""Rows of any length under sequence parallelism.

With `sequence_parallel` the activations between tensor-parallel layers are divided over the tensor-parallel ranks
along the tokens (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022).
PaddleNLP's layers then keep hidden states as [tokens of the batch / ranks, hidden] and restore the rows from a fixed
`seq_length`, in the configuration and in every attention layer; batches here are as long as their longest row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def set_row_length(model: Any, length: int) -> None:
    """Tells a model how long the rows of the next batch are; `length` must be a multiple of the tensor degree."""
    if not getattr(model.config, "sequence_parallel", False):
        return
    model.config.seq_length = length
    for layer in model.sublayers():
        if "seq_length" in layer.__dict__:
            layer.seq_length = length


@contextlib.contextmanager
def follow_row_lengths(model: Any) -> Iterator[int]:
    """Has a model look in every pass how long its rows are, as generation makes them: a prompt, then token after token.

    Args:
        model: PaddleNLP's, called with `input_ids` by name.

    Yields:
        What the number of its rows must be a multiple of: every rank has as many tokens of a batch as the next.
    """
    if not getattr(model.config, "sequence_parallel", False):
        yield 1
        return

    def look(layer: Any, _: Any, inputs: dict[str, Any]) -> None:
        set_row_length(layer, inputs["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield max(int(model.config.tensor_parallel_degree), 1)
    finally:
        hook.remove()
