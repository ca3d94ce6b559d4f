"""Turns linear layers into ones that hold a packed weight.

A layer keeps its place, its name and its bias; its class becomes one that inherits from the old and has a packed
weight where the parameter was. The layers of tensor and sequence parallelism call a function of theirs for the
product, which is replaced; PaddleNLP's LoRA layers call Paddle's own, so that their sum

    y = linear(x) + dropout(x) @ A @ B * scaling

is written here once for each way of dividing it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.meta_parallel import ColumnParallelLinear, RowParallelLinear
from paddle.distributed.fleet.utils.sequence_parallel_utils import (
    AllGatherOp,
    ColumnSequenceParallelLinear,
    ReduceScatterOp,
    RowSequenceParallelLinear,
)
from paddlenlp.peft.lora import lora_layers

from finetune.models.quantised.packed_weights import PackedWeight, packed_linear

PLAIN_CLASSES = (
    nn.Linear,
    ColumnParallelLinear,
    RowParallelLinear,
    ColumnSequenceParallelLinear,
    RowSequenceParallelLinear,
)


class _PackedLayer:
    """Of a layer with a packed weight: `packed` stands where the parameter was."""

    packed: PackedWeight

    @property
    def weight(self) -> PackedWeight:
        """The packed weight, which has the shape of the parameter that it replaces."""
        return self.packed


def is_packed(layer: Any) -> bool:
    """Whether a layer holds a packed weight."""
    return isinstance(layer, _PackedLayer)


def packed_layers(model: Any) -> dict[str, Any]:
    """Name -> layer of a model's layers with packed weights."""
    return {name: layer for name, layer in model.named_sublayers() if is_packed(layer)}


def linear_layers(model: Any, head_module: str) -> dict[str, Any]:
    """Name -> layer of the linear layers that are quantised: all but the output layer.

    Args:
        model: PaddleNLP's.
        head_module: Last part of the output layer's name.
    """
    return {
        name: layer
        for name, layer in model.named_sublayers()
        if isinstance(layer, PLAIN_CLASSES) and name.rpartition(".")[2] != head_module
    }


def hold_packed(layer: Any, packed: PackedWeight) -> None:
    """Gives a linear layer a packed weight in place of its parameter."""
    kind = _packed_class(type(layer))
    del layer._parameters["weight"]
    if hasattr(layer, "linear"):  # what Paddle's parallel layers multiply with
        layer.linear = packed_linear
    layer.__class__ = kind
    layer.packed = packed


def release_packed(layer: Any) -> PackedWeight:
    """Turns a packed layer into one with a parameter again, which has its shape and no memory."""
    packed: PackedWeight = layer.packed
    del layer.packed
    layer.__class__ = type(layer).__bases__[1]
    with paddle.LazyGuard():
        layer.weight = layer.create_parameter(
            packed.shape, dtype=packed.dtype, default_initializer=nn.initializer.Constant(0.0)
        )
    return packed


def _linear(layer: Any, x: Any) -> Any:
    return packed_linear(x, layer.packed, layer.bias)


def _update(layer: Any, x: Any) -> Any:
    return layer.lora_dropout(x) @ layer.lora_A @ layer.lora_B * layer.scaling


def _column_update(layer: Any, x: Any) -> Any:
    inner = mp_ops._c_identity(layer.lora_dropout(x) @ layer.lora_A, group=layer.model_parallel_group)
    update = inner @ layer.lora_B * layer.scaling
    is_gathered = layer.gather_output and layer.is_mp
    return mp_ops._c_concat(update, group=layer.model_parallel_group) if is_gathered else update


def _row_update(layer: Any, x: Any) -> Any:
    part = x if layer.input_is_parallel else mp_ops._c_split(x, group=layer.model_parallel_group)
    inner = mp_ops._mp_allreduce(
        layer.lora_dropout(part) @ layer.lora_A,
        group=layer.model_parallel_group,
        use_calc_stream=True,
        use_model_parallel=True,
    )
    return inner @ layer.lora_B * layer.scaling


def _column_sequence_update(layer: Any, x: Any) -> Any:
    inner = AllGatherOp.apply(layer.lora_dropout(x) @ layer.lora_A)
    return inner @ layer.lora_B * layer.scaling


def _row_sequence_update(layer: Any, x: Any) -> Any:
    inner = ReduceScatterOp.apply(layer.lora_dropout(x) @ layer.lora_A)
    return inner @ layer.lora_B * layer.scaling


_Product = Callable[[Any, Any], Any]
# Class -> the product with the frozen weight, and the low-rank update of that class.
_FORWARDS: dict[type, tuple[_Product, _Product | None]] = {
    nn.Linear: (_linear, None),
    ColumnParallelLinear: (ColumnParallelLinear.forward, None),
    RowParallelLinear: (RowParallelLinear.forward, None),
    ColumnSequenceParallelLinear: (ColumnSequenceParallelLinear.forward, None),
    RowSequenceParallelLinear: (RowSequenceParallelLinear.forward, None),
    lora_layers.LoRALinear: (_linear, _update),
    lora_layers.ColumnParallelLoRALinear: (ColumnParallelLinear.forward, _column_update),
    lora_layers.RowParallelLoRALinear: (RowParallelLinear.forward, _row_update),
    lora_layers.ColumnSequenceParallelLoRALinear: (
        ColumnSequenceParallelLinear.forward,
        _column_sequence_update,
    ),
    lora_layers.RowSequenceParallelLoRALinear: (RowSequenceParallelLinear.forward, _row_sequence_update),
}
_packed_classes: dict[type, type] = {}


def _packed_class(kind: type) -> type:
    """The class of layers like those of `kind` with a packed weight."""
    if kind not in _packed_classes:
        product, update = _FORWARDS[kind]

        def forward(layer: Any, x: Any, *_: Any, **__: Any) -> Any:
            result = product(layer, x)
            if update is None or layer.disable_lora:
                return result
            return result + update(layer, x)

        _packed_classes[kind] = type(f"Packed{kind.__name__}", (_PackedLayer, kind), {"forward": forward})
    return _packed_classes[kind]
