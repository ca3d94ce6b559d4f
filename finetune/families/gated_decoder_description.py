"""Descriptions of the decoders that share Llama's layout: grouped queries, gated feed-forward, RMS norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.decoder_description import (
    DecoderDescription,
    DecoderShape,
    LayerWeights,
    Linear,
    Norm,
    array,
    joined,
    linear,
)
from finetune.families.head_facts import TWO_NORMS, NormNames


@dataclass(frozen=True)
class GatedVariant:
    """What decoders of that layout have of their own.

    Attributes:
        norms: Names of a layer's norms.
        windowed_layers: See `DecoderShape`, as the others.
        score_scale: Factor on the scores.
        score_cap: Of the scores.
        logit_cap: Of the logits.
        normed_head: Whether the output layer's weights of each token are divided by their length.
        head_order: Order of the places of a head.
        rotary_amplitude: See `DecoderDescription`, as the last.
        local_frequencies: Of layers with a window.
    """

    norms: NormNames = TWO_NORMS
    windowed_layers: tuple[bool, ...] | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    normed_head: bool = False
    head_order: NDArray[Any] | None = None
    rotary_amplitude: float = 1.0
    local_frequencies: NDArray[Any] | None = None


_PLAIN = GatedVariant()


def describe_gated_decoder(
    model: Any,
    decoder: Any,
    *,
    rotary_frequencies: NDArray[Any] | None,
    activation: str = "silu",
    norm_offset: float = 0.0,
    embedding_scale: float = 1.0,
    head_dim: int | None = None,
    window: int | None = None,
    tied: bool = False,
    distance_slopes: NDArray[Any] | None = None,
    variant: GatedVariant = _PLAIN,
) -> DecoderDescription:
    """Describes a model of that layout.

    Args:
        model: The causal language model.
        decoder: Its decoder, with `embed_tokens`, `layers` and `norm`.
        rotary_frequencies: [head dim / 2]; None: no rotary positions.
        activation: Of the gate.
        norm_offset: What the norms add to their weights.
        embedding_scale: Factor on word embeddings.
        head_dim: Size of a head where it is not hidden size / heads.
        window: Sliding window of attention.
        tied: Whether the output layer is the input embedding.
        distance_slopes: See `DecoderDescription`.
        variant: What few models have.
    """
    config = model.config
    head_dim = head_dim or config.hidden_size // config.num_attention_heads

    def norm(layer: Any) -> Norm:
        return Norm(array(layer.weight) + np.float32(norm_offset), float(config.rms_norm_eps))

    def layer(number: int) -> LayerWeights:
        return _layer_weights(decoder.layers[number], norm, variant.norms)

    return DecoderDescription(
        shape=DecoderShape(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            activation=activation,
            gated=True,
            embedding_scale=embedding_scale,
            max_positions=config.max_position_embeddings,
            window=window,
            windowed_layers=variant.windowed_layers,
            score_scale=variant.score_scale,
            score_cap=variant.score_cap,
            logit_cap=variant.logit_cap,
            head_order=variant.head_order,
        ),
        embedding=array(decoder.embed_tokens.weight),
        layer=layer,
        final_norm=norm(decoder.norm),
        head=None if tied else _head(model.lm_head.weight, normed=variant.normed_head),
        rotary_frequencies=rotary_frequencies,
        rotary_amplitude=variant.rotary_amplitude,
        local_frequencies=variant.local_frequencies,
        distance_slopes=distance_slopes,
    )


def _head(weight: Any, *, normed: bool) -> NDArray[Any]:
    head = array(weight)  # [hidden, vocabulary]
    return head / np.maximum(np.linalg.norm(head, axis=0), np.float32(1e-12)) if normed else head


def _layer_weights(block: Any, norm: Callable[[Any], Norm], names: NormNames) -> LayerWeights:
    def named(name: str | None) -> Norm | None:
        return None if name is None else norm(getattr(block, name))

    attention, mlp = block.self_attn, block.mlp
    normed = hasattr(attention, "q_norm")
    query, key, value = _projections(attention)
    joins_inner = hasattr(mlp, "gate_up_proj")
    gate_up = linear(mlp.gate_up_proj) if joins_inner else joined(linear(mlp.gate_proj), linear(mlp.up_proj))
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
        inner_norm=norm(getattr(block, names.inner)),
        inner=gate_up,
        outer=linear(block.mlp.down_proj),
    )


def _projections(attention: Any) -> tuple[Linear, Linear, Linear]:
    """Layers to queries, keys and values; those that one layer gives are taken out of it."""
    if hasattr(attention, "q_proj"):
        return linear(attention.q_proj), linear(attention.k_proj), linear(attention.v_proj)
    columns = np.arange(attention.query_key_value_proj.weight.shape[1])
    num_kv_heads, head_dim = attention.num_kv_heads, attention.head_dim
    if attention.facts.grouped_input:
        groups = columns.reshape(num_kv_heads, -1, head_dim)
        parts = [groups[:, :-2].ravel(), groups[:, -2].ravel(), groups[:, -1].ravel()]
    else:
        num_queries = attention.num_heads * head_dim
        parts = np.split(columns, [num_queries, num_queries + num_kv_heads * head_dim])
    query, key, value = (linear(attention.query_key_value_proj, part) for part in parts)
    return query, key, value
