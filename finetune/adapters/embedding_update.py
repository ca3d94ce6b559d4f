"""A low-rank update of the embedding of the tokens, as peft has it.

    y = E[ids] + scaling * A[ids] B,    A [tokens, r], B [r, hidden]

A starts at zero and B from a normal draw. Where tensor-parallel ranks share the vocabulary, each has its rows of A, which are
looked up as the rows of E are; B is whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.distributed.fleet.meta_parallel import VocabParallelEmbedding

_classes: dict[type, type] = {}


def is_embedding(layer: Any) -> bool:
    """Whether a layer is a table that such an update can stand beside."""
    return isinstance(layer, nn.Embedding | VocabParallelEmbedding)


def add_embedding_update(layer: Any, *, rank: int, factor: float, settings: Any, seed: int) -> None:
    """Gives an embedding its update.

    Args:
        layer: The embedding, or this tensor rank's rows of it.
        rank: Columns of A.
        factor: What the update is multiplied with.
        settings: The adapter's configuration, for the type of the matrices and the learning rate of B.
        seed: Of this layer alone.
    """
    num_rows, width = layer.weight.shape
    left = layer.create_parameter([num_rows, rank], dtype=settings.dtype)
    attributes = paddle.ParamAttr(learning_rate=settings.lora_plus_scale)
    right = layer.create_parameter([rank, width], attr=attributes, dtype=settings.dtype)
    drawn = np.random.default_rng(seed).standard_normal((rank, width)).astype(np.float32)
    left.set_value(paddle.zeros_like(left))
    right.set_value(paddle.to_tensor(drawn).astype(right.dtype))
    left.is_distributed = bool(getattr(layer.weight, "is_distributed", False))
    right.is_distributed = False
    if left.is_distributed:
        left.split_axis = 0
    layer.lora_A, layer.lora_B = left, right
    layer.r, layer.scaling = rank, factor
    layer.disable_lora = layer.merged = False
    layer.__class__ = _updated_class(type(layer))


def updated_embeddings(model: Any) -> list[Any]:
    """The embeddings of a model that have an update."""
    kinds = tuple(_classes.values())
    return [layer for _, layer in model.named_sublayers() if isinstance(layer, kinds)]


def _updated_class(kind: type) -> type:
    """The class of embeddings like those of `kind` with an update."""
    if kind not in _classes:
        look_up: Any = kind.forward  # type: ignore[attr-defined]

        def forward(layer: Any, ids: Any) -> Any:
            output = look_up(layer, ids)
            if layer.disable_lora or layer.merged:
                return output
            weight = layer._parameters["weight"]
            layer._parameters["weight"] = layer.lora_A
            try:
                inner = look_up(layer, ids)  # [..., r]
            finally:
                layer._parameters["weight"] = weight
            return output + (paddle.matmul(inner, layer.lora_B) * layer.scaling).astype(output.dtype)

        def merge(layer: Any) -> None:
            if not layer.merged:
                update = paddle.matmul(layer.lora_A, layer.lora_B) * layer.scaling
                layer.weight.set_value(layer.weight + update.astype(layer.weight.dtype))
                layer.merged = True

        _classes[kind] = type(f"LoRA{kind.__name__}", (kind,), {"forward": forward, "merge": merge})
    return _classes[kind]
