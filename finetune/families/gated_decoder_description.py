"""Descriptions of the decoders that share Llama's layout: grouped queries, gated feed-forward, RMS norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.decoder_description import (
    DecoderDescription,
    DecoderShape,
    ExpertWeights,
    LayerWeights,
    Linear,
    Norm,
    SharedExpert,
    array,
    joined,
    linear,
)
from finetune.families.head_facts import TWO_NORMS, NormNames


def describe_gated_decoder(
    model: Any,
    decoder: Any,
    *,
    rotary_frequencies: NDArray[Any] | None,
    norms: NormNames = TWO_NORMS,
    norm_offset: float = 0.0,
    tied: bool = False,
    normed_head: bool = False,
    more: Mapping[str, Any] | None = None,
    **shape: Any,
) -> DecoderDescription:
    """Describes a model of that layout.

    Args:
        model: The causal language model.
        decoder: Its decoder, with `embed_tokens`, `layers` and `norm`.
        rotary_frequencies: [head dim / 2]; None: no rotary positions.
        norms: Names of a layer's norms.
        norm_offset: What the norms add to their weights.
        tied: Whether the output layer is the input embedding.
        normed_head: Whether the output layer's weights of each token are divided by their length.
        more: Further fields of `DecoderDescription`.
        **shape: Fields of `DecoderShape` that are not Llama's.
    """
    config = model.config

    def norm(layer: Any) -> Norm:
        bias = getattr(layer, "bias", None)
        weight = array(layer.weight) + np.float32(norm_offset)
        return Norm(weight, float(config.rms_norm_eps), None if bias is None else array(bias))

    def layer(number: int) -> LayerWeights:
        return _layer_weights(decoder.layers[number], norm, norms)

    sizes = {
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "gated": True,
        "activation": "silu",
        "max_positions": config.max_position_embeddings,
    }
    return DecoderDescription(
        shape=DecoderShape(**sizes | shape),
        embedding=array(decoder.embed_tokens.weight),
        layer=layer,
        final_norm=norm(decoder.norm),
        head=None if tied else _head(model.lm_head.weight, normed=normed_head),
        rotary_frequencies=rotary_frequencies,
        **more or {},
    )


def _head(weight: Any, *, normed: bool) -> NDArray[Any]:
    head = array(weight)  # [hidden, vocabulary]
    return head / np.maximum(np.linalg.norm(head, axis=0), np.float32(1e-12)) if normed else head


def _layer_weights(block: Any, norm: Callable[[Any], Norm], names: NormNames) -> LayerWeights:
    def named(name: str | None) -> Norm | None:
        return None if name is None else norm(getattr(block, name))

    attention, mlp = block.self_attn, block.mlp
    normed, has_experts = hasattr(attention, "q_norm"), hasattr(mlp, "experts_facts")
    query, key, value = _projections(attention)
    return LayerWeights(
        query_norm=norm(block.self_attn.q_norm) if normed else None,
        key_norm=norm(block.self_attn.k_norm) if normed else None,
        attention_norm=norm(getattr(block, names.attention)),
        attention_output_norm=named(names.attention_output),
        inner_output_norm=named(names.inner_output),
        query=query,
        key=key,
        value=value,
        output=linear(block.self_attn.o_proj),
        inner_norm=norm(getattr(block, names.inner or names.attention)),
        inner=None if has_experts else _inner(mlp),
        outer=None if has_experts else linear(mlp.down_proj),
        experts=_experts(mlp) if has_experts else None,
    )


def _experts(mlp: Any) -> ExpertWeights:
    """Of a `finetune.families.experts.ExpertFeedForward`."""
    facts, experts = mlp.experts_facts, list(mlp.experts)
    shared = None
    if facts.shared_size:
        expert = mlp.shared_expert
        shared = SharedExpert(linear(mlp.shared_expert_gate), _inner(expert), linear(expert.down_proj))
    return ExpertWeights(
        router=linear(mlp.gate),
        inner=np.stack([_inner(each).weight for each in experts]),
        outer=np.stack([array(each.down_proj.weight) for each in experts]),
        num_chosen=facts.num_chosen,
        normalised=facts.normalised,
        shared=shared,
    )


def _inner(mlp: Any) -> Linear:
    """The layer to the inner size; with a gate that of both, the gate's first."""
    if hasattr(mlp, "gate_up_proj"):
        return linear(mlp.gate_up_proj)
    return (
        joined(linear(mlp.gate_proj), linear(mlp.up_proj))
        if hasattr(mlp, "gate_proj")
        else linear(mlp.up_proj)
    )


def _projections(attention: Any) -> tuple[Linear, Linear, Linear]:
    """Layers to queries, keys and values; those that one layer gives are taken out of it."""
    if hasattr(attention, "q_proj"):
        return linear(attention.q_proj), linear(attention.k_proj), linear(attention.v_proj)
    layer, head_dim = attention.query_key_value_proj, attention.head_dim
    columns = np.arange(layer.weight.shape[1])
    if attention.facts.grouped_input:
        groups = columns.reshape(attention.num_kv_heads, -1, head_dim)
        parts = [groups[:, :-2].ravel(), groups[:, -2].ravel(), groups[:, -1].ravel()]
    else:
        num_queries, num_keys = attention.num_heads * head_dim, attention.num_kv_heads * head_dim
        parts = np.split(columns, [num_queries, num_queries + num_keys])
    query, key, value = (linear(layer, part) for part in parts)
    return query, key, value
