"""MosLoRA: a trained square matrix between the two of LoRA, W + scaling * A @ M @ B with M [r, r].

Wu et al., "Mixture-of-Subspaces in Low-Rank Adaptation" (2024). M is whole on every tensor-parallel rank; it is
multiplied with the matrix that is whole, too, so that every rank has its whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
from paddle.distributed.fleet.utils.sequence_parallel_utils import mark_as_sequence_parallel_parameter

_classes: dict[type, type] = {}


def add_mixer(layer: Any, *, seed: int) -> None:
    """Makes a MosLoRA layer of one of PaddleNLP's LoRA layers; M starts uniform within +-1 / sqrt(r), as PaddleNLP's.

    Args:
        layer: One whose matrices stand already.
        seed: Of this layer alone.
    """
    rank = int(layer.r)
    bound = 1 / math.sqrt(rank)
    drawn = np.random.default_rng([seed, 1]).uniform(-bound, bound, (rank, rank)).astype(np.float32)
    mixer = layer.create_parameter([rank, rank], dtype=layer.lora_A.dtype)
    mixer.set_value(paddle.to_tensor(drawn).astype(mixer.dtype))
    mixer.is_distributed = False
    if any(getattr(each, "sequence_parallel", False) for each in (layer.lora_A, layer.lora_B)):
        mark_as_sequence_parallel_parameter(mixer)
    layer.lora_AB = mixer
    layer.__class__ = _mixed_class(type(layer))


@contextmanager
def _mixer_in(layer: Any) -> Iterator[None]:
    """While it lasts, one of the two matrices has the third in it."""
    if hasattr(layer, "input_size_per_partition"):  # A is in parts
        name, value = "lora_B", paddle.matmul(layer.lora_AB, layer.lora_B)
    else:
        name, value = "lora_A", paddle.matmul(layer.lora_A, layer.lora_AB)
    kept = layer._parameters[name]
    layer._parameters[name] = value
    try:
        yield
    finally:
        layer._parameters[name] = kept


def _mixed_class(kind: type) -> type:
    """The class of layers like those of `kind` with a matrix between A and B."""
    if kind not in _classes:
        product: Any = kind.forward  # type: ignore[attr-defined]

        def forward(layer: Any, x: Any, *_: Any, **__: Any) -> Any:
            if layer.disable_lora or layer.merged:
                return product(layer, x)
            with _mixer_in(layer):
                return product(layer, x)

        def merge(layer: Any) -> None:
            with _mixer_in(layer):
                kind.merge(layer)  # type: ignore[attr-defined]

        _classes[kind] = type(f"Mixed{kind.__name__}", (kind,), {"forward": forward, "merge": merge})
    return _classes[kind]
