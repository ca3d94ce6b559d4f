"""Descriptions of the decoders that share Llama's layout: grouped queries, gated feed-forward, RMS norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.decoder_description import (
    DecoderDescription,
    DecoderShape,
    LayerWeights,
    Norm,
    array,
    joined,
    linear,
)


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
    """
    config = model.config
    head_dim = head_dim or config.hidden_size // config.num_attention_heads

    def norm(layer: Any) -> Norm:
        return Norm(array(layer.weight) + np.float32(norm_offset), float(config.rms_norm_eps))

    def layer(number: int) -> LayerWeights:
        return _layer_weights(decoder.layers[number], norm)

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
        ),
        embedding=array(decoder.embed_tokens.weight),
        layer=layer,
        final_norm=norm(decoder.norm),
        head=None if tied else array(model.lm_head.weight),
        rotary_frequencies=rotary_frequencies,
        distance_slopes=distance_slopes,
    )


def _layer_weights(block: Any, norm: Callable[[Any], Norm]) -> LayerWeights:
    normed = hasattr(block.self_attn, "q_norm")
    return LayerWeights(
        query_norm=norm(block.self_attn.q_norm) if normed else None,
        key_norm=norm(block.self_attn.k_norm) if normed else None,
        attention_norm=norm(block.input_layernorm),
        query=linear(block.self_attn.q_proj),
        key=linear(block.self_attn.k_proj),
        value=linear(block.self_attn.v_proj),
        output=linear(block.self_attn.o_proj),
        inner_norm=norm(block.post_attention_layernorm),
        inner=joined(linear(block.mlp.gate_proj), linear(block.mlp.up_proj)),
        outer=linear(block.mlp.down_proj),
    )
