"""Qwen (v1) for the static-graph export.

Up to `seq_length` tokens neither the stretched rotary positions (dynamic NTK) nor the scaled queries
(log n attention) change anything; longer texts are not exported.
"""

from __future__ import annotations

from typing import Any

from finetune.families.decoder_description import (
    DecoderDescription,
    DecoderShape,
    LayerWeights,
    Norm,
    array,
    joined,
    linear,
)
from finetune.families.rotary_scaling import inverse_frequencies


def describe(model: Any) -> DecoderDescription:
    """The description of a Qwen."""
    config, decoder = model.config, model.qwen
    hidden = config.hidden_size

    def norm(layer: Any) -> Norm:
        return Norm(array(layer.weight), float(config.layer_norm_epsilon))

    def layer(number: int) -> LayerWeights:
        block = decoder.h[number]
        query, key, value = (
            linear(block.attn.c_attn, slice(part * hidden, (part + 1) * hidden)) for part in range(3)
        )
        return LayerWeights(
            attention_norm=norm(block.ln_1),
            query=query,
            key=key,
            value=value,
            output=linear(block.attn.c_proj),
            inner_norm=norm(block.ln_2),
            inner=joined(linear(block.mlp.w2), linear(block.mlp.w1)),
            outer=linear(block.mlp.c_proj),
        )

    head_dim = hidden // config.num_attention_heads
    return DecoderDescription(
        shape=DecoderShape(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_attention_heads,
            head_dim=head_dim,
            activation="silu",
            gated=True,
            max_positions=config.seq_length,
        ),
        embedding=array(decoder.wte.weight),
        layer=layer,
        final_norm=norm(decoder.ln_f),
        head=array(model.lm_head.weight),
        rotary_frequencies=inverse_frequencies(config.rotary_emb_base, head_dim),
    )
