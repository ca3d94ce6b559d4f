"""Weights of a decoder in the order that makes a decoding step cheap on CPU.

One step multiplies a handful of rows with every weight once, so that reading the weights is all the work,
and every further operation is overhead. Here, before anything is exported,

- query, key and value become one matrix, its columns ordered [group, kv head, place], so that one
  transposition separates them and every group of query heads meets the keys by broadcasting;
- the factor on the scores goes into the queries, the weight of an RMS norm into the matrix that follows it,
  what is left of that norm is x / sqrt(sum(x^2) + n * epsilon), one kernel.

The last is for float32 only: products of weights would be rounded in half precision, while training rounds neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.decoder_description import DecoderShape, ExpertWeights, LayerWeights, Linear, Norm


@dataclass(frozen=True)
class PackedLayer:
    """One layer as the graph holds it; norms with a bias keep their weights, others have none left.

    Attributes:
        heads_norm: What multiplies normed query and key heads [groups + 1, 1, 1, 1, head dim], keys last; see
            `rms_gain`. None where heads are not normed.
        heads_epsilon: Of that norm.
        experts: In the place of `inner` and `outer`, as described.
    """

    attention_norm: Norm
    qkv: Linear
    output: Linear
    inner_norm: Norm
    inner: Linear | None
    outer: Linear | None
    attention_output_norm: Norm | None = None
    inner_output_norm: Norm | None = None
    heads_norm: NDArray[Any] | None = None
    heads_epsilon: float = 0.0
    experts: ExpertWeights | None = None


def pack_layer(layer: LayerWeights, shape: DecoderShape, *, fold: bool = True) -> PackedLayer:
    """Joins and orders the weights of a layer; see the module's text.

    Args:
        layer: As the family describes it.
        shape: Sizes of the decoder.
        fold: Whether factors are taken into matrices.
    """
    scale = shape.score_factor if fold else 1.0
    normed = layer.query_norm is not None
    qkv = _query_key_value(layer, shape, scale=1.0 if normed else scale)
    return PackedLayer(
        attention_norm=layer.attention_norm,
        qkv=fold_norm(layer.attention_norm, qkv) if fold else qkv,
        output=Linear(_grouped_rows(layer.output.weight, shape), layer.output.bias),
        inner_norm=layer.inner_norm,
        inner=fold_norm(layer.inner_norm, layer.inner) if fold and layer.inner else layer.inner,
        outer=layer.outer,
        attention_output_norm=layer.attention_output_norm,
        inner_output_norm=layer.inner_output_norm,
        heads_norm=_heads_gain(layer, shape, scale=scale) if normed else None,
        heads_epsilon=layer.query_norm.epsilon if layer.query_norm is not None else 0.0,
        experts=layer.experts,
    )


def _heads_gain(layer: LayerWeights, shape: DecoderShape, *, scale: float) -> NDArray[Any]:
    """What norms of heads leave to multiply with, [groups + 1, 1, 1, 1, head dim].

    The queries' factor stands behind their norm, which would undo one before it.
    """
    assert layer.query_norm is not None and layer.key_norm is not None
    query, key = (reorder_keys(rms_gain(norm), shape) for norm in (layer.query_norm, layer.key_norm))
    groups = shape.num_heads // shape.num_kv_heads
    gains: NDArray[Any] = np.stack([*[query * np.float32(scale)] * groups, key])
    return gains.reshape(groups + 1, 1, 1, 1, shape.head_dim)


def fold_norm(norm: Norm, linear: Linear) -> Linear:
    """Takes the weight of an RMS norm into the layer behind it."""
    return linear if norm.bias is not None else Linear(rms_gain(norm)[:, None] * linear.weight, linear.bias)


def rms_gain(norm: Norm) -> NDArray[Any]:
    """What is left to multiply with behind x / sqrt(sum(x^2) + n * epsilon), [hidden]."""
    return norm.weight * np.float32(math.sqrt(len(norm.weight)))


def reorder_keys(keys: NDArray[Any], shape: DecoderShape) -> NDArray[Any]:
    """Keys [..., head dim] of the model's own order in the order of the packed weights."""
    return keys if shape.head_order is None else keys[..., shape.head_order]


def _query_key_value(layer: LayerWeights, shape: DecoderShape, *, scale: float) -> Linear:
    """[hidden, (groups + 2) * kv heads * head dim], queries times `scale`."""
    factor = np.float32(scale)
    parts = [
        _columns(layer.query.weight, shape, is_query=True) * factor,
        _columns(layer.key.weight, shape),
        layer.value.weight,
    ]
    biases = [layer.query.bias, layer.key.bias, layer.value.bias]
    if any(bias is None for bias in biases):
        return Linear(np.concatenate(parts, axis=1))
    query, key, value = (np.asarray(bias)[None] for bias in biases)
    bias = [_columns(query, shape, is_query=True) * factor, _columns(key, shape), value]
    return Linear(np.concatenate(parts, axis=1), np.concatenate(bias, axis=1)[0])


def _columns(weight: NDArray[Any], shape: DecoderShape, *, is_query: bool = False) -> NDArray[Any]:
    """Columns of queries or keys [in, heads * head dim] in the order of the cache; queries by group first."""
    heads = reorder_keys(weight.reshape(weight.shape[0], shape.num_kv_heads, -1, shape.head_dim), shape)
    if is_query:
        heads = heads.transpose(0, 2, 1, 3)
    return heads.reshape(weight.shape[0], -1)


def _grouped_rows(weight: NDArray[Any], shape: DecoderShape) -> NDArray[Any]:
    """Rows of the output projection in the order in which the groups of queries come."""
    heads = weight.reshape(shape.num_kv_heads, -1, shape.head_dim, weight.shape[1])
    return np.ascontiguousarray(heads.transpose(1, 0, 2, 3).reshape(weight.shape))
