"""DoRA: the length of every column of an updated weight is trained beside its direction.

    y = x @ (m / |W + scaling * A @ B|) (W + scaling * A @ B) + bias,    m [out], |.| the length of each column
Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024). As there and in peft, the length is a constant to the
backward pass, and m starts as the length of the columns at the start. Dropout is for everything but the frozen W, so
that with it
    y = x @ W + bias - x' @ W + (m / |.|) x' @ (W + scaling * A @ B),    x' = dropout(x).

The squared length is |W|^2 + 2 scaling sum_r (A^T W) B + scaling^2 sum_r (A^T A B) B, whose first term never changes: no
matrix of the weight's size is made. Where ranks share the rows of W, each has a part of that sum.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.utils.sequence_parallel_utils import mark_as_sequence_parallel_parameter
from paddle.nn import Dropout, Identity
from paddlenlp.peft.lora.lora_layers import RowSequenceParallelLoRALinear

from finetune.models.quantised.layers import is_packed

MAGNITUDE = "lora_magnitude"
_classes: dict[type, type] = {}
_UNCHANGED = Identity()


def add_magnitude(layer: Any) -> None:
    """Makes a DoRA layer of one of PaddleNLP's LoRA layers, whose weight and matrices stand already.

    The magnitude [out] (of this tensor-parallel rank's columns) becomes the length of the columns as they are.
    """
    layer.weight_squares = []
    length = _column_lengths(layer)
    magnitude = layer.create_parameter([length.shape[0]], dtype=layer.lora_B.dtype)
    magnitude.set_value(length.astype(magnitude.dtype))
    magnitude.is_distributed = bool(getattr(layer.lora_B, "is_distributed", False))
    if magnitude.is_distributed:
        magnitude.split_axis = 0
    if isinstance(layer, RowSequenceParallelLoRALinear):
        mark_as_sequence_parallel_parameter(magnitude)
    layer.lora_magnitude = magnitude
    layer.__class__ = _dora_class(type(layer))


def _dora_class(kind: type) -> type:
    """The class of layers like those of `kind` with a magnitude."""
    if kind not in _classes:
        product: Any = kind.forward  # type: ignore[attr-defined]

        def forward(layer: Any, x: Any, *_: Any, **__: Any) -> Any:
            if layer.disable_lora or layer.merged:
                return product(layer, x)
            return _forward(layer, x, product)

        def merge(layer: Any) -> None:
            if not layer.merged:
                scale = layer.lora_magnitude.astype("float32") / _column_lengths(layer)  # [out]
                kind.merge(layer)  # type: ignore[attr-defined]
                layer.weight.set_value(layer.weight * scale.astype(layer.weight.dtype))

        _classes[kind] = type(f"Dora{kind.__name__}", (kind,), {"forward": forward, "merge": merge})
    return _classes[kind]


def _forward(layer: Any, x: Any, product: Any) -> Any:
    scale = layer.lora_magnitude.astype("float32") / _column_lengths(layer)  # [out]
    dropout = layer.lora_dropout
    if not (isinstance(dropout, Dropout) and layer.training):
        return _scaled(layer, product(layer, x), scale)
    dropped = dropout(x)
    layer._sub_layers["lora_dropout"] = _UNCHANGED  # it is in `dropped` already
    try:
        updated = _scaled(layer, product(layer, dropped), scale)
    finally:
        layer._sub_layers["lora_dropout"] = dropout
    layer.disable_lora = True
    try:
        return updated + (product(layer, x) - product(layer, dropped))
    finally:
        layer.disable_lora = False


def _scaled(layer: Any, output: Any, scale: Any) -> Any:
    """The output [..., out] with everything but the bias scaled."""
    scale = scale.astype(output.dtype)
    if layer.bias is None:
        return output * scale
    bias = layer.bias.astype(output.dtype)
    return (output - bias) * scale + bias


def _column_lengths(layer: Any) -> Any:
    """Lengths of the columns of the updated weight, float32 [out], without a gradient."""
    with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
        left, right = layer.lora_A.astype("float32"), layer.lora_B.astype("float32")
        weight = _weight(layer)  # [in, out]
        if not layer.weight_squares:
            layer.weight_squares.append(weight.square().sum(0))
        cross = (paddle.matmul(left, weight, transpose_x=True) * right).sum(0)
        inner = paddle.matmul(paddle.matmul(left, left, transpose_x=True), right)
        total = (
            layer.weight_squares[0] + 2 * layer.scaling * cross + layer.scaling**2 * (inner * right).sum(0)
        )
        if hasattr(layer, "input_size_per_partition") and layer.is_mp:
            total = mp_ops._mp_allreduce(
                total, group=layer.model_parallel_group, use_calc_stream=True, use_model_parallel=True
            )
        return total.clip(min=0).sqrt()


def _weight(layer: Any) -> Any:
    """The frozen weight [in, out], float32."""
    if is_packed(layer):
        return layer.weight.values().astype("float32").t()
    return layer.weight.astype("float32")
