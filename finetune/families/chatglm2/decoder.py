"""ChatGLM2 for the static-graph export: only half of a head turns with the position, in neighbouring pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.chatglm2.generation import rotary_facts
from finetune.families.decoder_description import (
    DecoderDescription,
    DecoderShape,
    LayerWeights,
    Norm,
    array,
    linear,
)
from finetune.families.rotary_scaling import inverse_frequencies


def describe(model: Any) -> DecoderDescription:
    """The description of a ChatGLM2 or ChatGLM3."""
    config, decoder = model.config, model.chatglm_v2
    head_dim = config.kv_channels
    query_size = config.num_attention_heads * head_dim
    kv_size = config.multi_query_group_num * head_dim

    def norm(layer: Any) -> Norm:
        return Norm(array(layer.weight), float(layer.epsilon))

    def layer(number: int) -> LayerWeights:
        block = decoder.encoder.layers[number]
        fused = block.self_attention.query_key_value
        return LayerWeights(
            attention_norm=norm(block.input_layernorm),
            query=linear(fused, slice(0, query_size)),
            key=linear(fused, slice(query_size, query_size + kv_size)),
            value=linear(fused, slice(query_size + kv_size, None)),
            output=linear(block.self_attention.dense),
            inner_norm=norm(block.post_attention_layernorm),
            inner=linear(block.mlp.dense_h_to_4h),
            outer=linear(block.mlp.dense_4h_to_h),
        )

    base, divisor = rotary_facts(config)
    turning = inverse_frequencies(base, head_dim // 2) / np.float32(divisor)
    return DecoderDescription(
        shape=DecoderShape(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.multi_query_group_num,
            head_dim=head_dim,
            activation="silu",
            gated=True,
            residual_from_norm=config.apply_residual_connection_post_layernorm,
            max_positions=config.max_sequence_length,
            head_order=_head_order(head_dim),
        ),
        embedding=array(decoder.embedding.word_embeddings.weight),
        layer=layer,
        final_norm=norm(decoder.encoder.final_layernorm),
        head=array(decoder.output_layer.weight),
        rotary_frequencies=np.concatenate([turning, np.zeros_like(turning)]),
    )


def _head_order(head_dim: int) -> NDArray[Any]:
    """Brings the two places of each turning pair to i and i + head_dim / 2; the rest follows in halves."""
    half, quarter = head_dim // 2, head_dim // 4
    rest = np.arange(half, head_dim)
    return np.concatenate([np.arange(0, half, 2), rest[:quarter], np.arange(1, half, 2), rest[quarter:]])
