"""LoKr on PaddleNLP's LoRA layers; see `kronecker.py` for its matrices.

    y[l, k] = alpha / r * sum over m, n of w1[l, m] x[m, n] w2[k, n]

with the inputs and the outputs of a layer seen as matrices, so that nothing of the weight's size is made. The matrices
are whole on every tensor-parallel rank: a rank computes the outputs that its columns of the weight give, or what its rows
add to all of them, and the parts of the gradient are summed after the backward pass.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.utils.sequence_parallel_utils import (
    AllGatherOp,
    ColumnSequenceParallelLinear,
    ReduceScatterOp,
    RowSequenceParallelLinear,
    mark_as_sequence_parallel_parameter,
)

from finetune.adapters.kronecker import draw_matrix, kronecker_shapes
from finetune.checkpoints.tensors_of_ranks import find_local_split

PREFIX = "lokr_"
_classes: dict[type, type] = {}


def add_kronecker(name: str, layer: Any, config: Any, settings: Any, *, seed: int) -> None:
    """Makes a LoKr layer of one of PaddleNLP's LoRA layers, whose matrices go.

    Args:
        name: Of the layer.
        layer: One whose matrices, of any rank, stand already.
        config: PaddleNLP's configuration of the model.
        settings: The adapter's configuration.
        seed: Of this layer alone.
    """
    rule, degree = settings.rule, max(config.tensor_parallel_degree, 1)
    split = find_local_split(f"{name}.weight", config)
    shape = tuple(layer.weight.shape)
    num_in, num_out = split.whole_shape(shape, degree) if split else shape
    layer.r, layer.scaling = rule.rank_of(name), rule.factor_of(name)
    shapes = kronecker_shapes(
        num_in, num_out, rank=layer.r, factor=settings.lokr_factor, decompose_both=settings.decompose_both
    )
    for end, each in shapes.items():
        matrix = layer.create_parameter(list(each), dtype=layer.lora_A.dtype)
        matrix.set_value(paddle.to_tensor(draw_matrix(end, each, seed)).astype(matrix.dtype))
        matrix.is_distributed = False
        if split:
            mark_as_sequence_parallel_parameter(matrix)  # every rank has a part of its gradient
        setattr(layer, f"{PREFIX}{end}", matrix)
    del layer._parameters["lora_A"], layer._parameters["lora_B"]
    rank = max(config.tensor_parallel_rank, 0)
    layer.kronecker_place = (num_in, num_out), _ranges(split, (num_in, num_out), degree, rank)
    layer.__class__ = _lokr_class(type(layer))


def _ranges(split: Any, shape: tuple[int, int], degree: int, rank: int) -> list[tuple[int, int]]:
    """The columns, or the rows, of the weight that this rank has; empty where it has all."""
    if split is None:
        return []
    places = split.places(shape, degree, rank)
    return [(place[split.axis].start, place[split.axis].stop) for place in places]


def _factor(layer: Any, name: str) -> tuple[Any, ...]:
    """w1 or w2: itself, or the two that make it."""
    if (whole := getattr(layer, f"{PREFIX}{name}", None)) is not None:
        return (whole,)
    return getattr(layer, f"{PREFIX}{name}_a"), getattr(layer, f"{PREFIX}{name}_b")


def _product(layer: Any, x: Any) -> Any:
    """The update's share of the outputs [..., out] for inputs [..., in], of the whole layer both."""
    first, second = _factor(layer, "w1"), _factor(layer, "w2")
    x = x.astype(first[0].dtype)
    num_inner = second[-1].shape[1]
    inner = x.reshape([*x.shape[:-1], -1, num_inner])  # [..., m, n]
    for each in reversed(second):
        inner = paddle.matmul(inner, each, transpose_y=True)  # [..., m, k]
    for each in reversed(first):
        inner = paddle.matmul(each, inner)  # [..., l, k]
    return inner.reshape([*x.shape[:-1], -1]) * layer.scaling


def _column_update(layer: Any, x: Any) -> Any:
    ranges = layer.kronecker_place[1]
    if isinstance(layer, ColumnSequenceParallelLinear):
        output = _product(layer, AllGatherOp.apply(x))
    else:
        output = _product(layer, mp_ops._c_identity(x, group=layer.model_parallel_group))
    if ranges:
        output = paddle.concat([output[..., begin:end] for begin, end in ranges], axis=-1)
    is_gathered = getattr(layer, "gather_output", False) and layer.is_mp
    return mp_ops._c_concat(output, group=layer.model_parallel_group) if is_gathered else output


def _row_update(layer: Any, x: Any) -> Any:
    (num_in, _), ranges = layer.kronecker_place
    part = x if layer.input_is_parallel else mp_ops._c_split(x, group=layer.model_parallel_group)
    if ranges:  # the inputs of other ranks are theirs to count
        ((begin, end),) = ranges
        sides = [paddle.zeros([*part.shape[:-1], size], part.dtype) for size in (begin, num_in - end)]
        part = paddle.concat([each for each in (sides[0], part, sides[1]) if each.shape[-1]], axis=-1)
    output = _product(layer, part)
    if isinstance(layer, RowSequenceParallelLinear):
        return ReduceScatterOp.apply(output)
    return mp_ops._mp_allreduce(
        output, group=layer.model_parallel_group, use_calc_stream=True, use_model_parallel=True
    )


def _update(layer: Any, x: Any) -> Any:
    if hasattr(layer, "input_size_per_partition"):
        return _row_update(layer, x)
    return _column_update(layer, x) if hasattr(layer, "output_size_per_partition") else _product(layer, x)


def _lokr_class(kind: type) -> type:
    """The class of layers like those of `kind` with a Kronecker product beside the weight."""
    if kind not in _classes:
        product: Any = kind.forward  # type: ignore[attr-defined]

        def forward(layer: Any, x: Any, *_: Any, **__: Any) -> Any:
            if layer.disable_lora or layer.merged:
                return product(layer, x)
            layer.disable_lora = True
            try:
                output = product(layer, x)
            finally:
                layer.disable_lora = False
            return output + _update(layer, x).astype(output.dtype)

        def merge(layer: Any) -> None:
            if not layer.merged:
                identity = paddle.eye(layer.weight.shape[0], dtype=layer.weight.dtype)
                layer.weight.set_value(layer.weight + _product(layer, identity).astype(layer.weight.dtype))
                layer.merged = True

        _classes[kind] = type(f"LoKr{kind.__name__}", (kind,), {"forward": forward, "merge": merge})
    return _classes[kind]
