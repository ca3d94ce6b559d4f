"""OPT for the static-graph export."""

from __future__ import annotations

from typing import Any

from finetune.families.decoder_description import (
    DecoderDescription,
    DecoderShape,
    LayerWeights,
    array,
    layer_norm,
    linear,
)
from finetune.families.opt.layers import POSITION_OFFSET

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_tanh"}


def describe(model: Any) -> DecoderDescription:
    """The description of an OPT."""
    config, decoder, embeddings = model.config, model.opt.decoder, model.opt.embeddings
    num_heads = config.num_attention_heads

    def layer(number: int) -> LayerWeights:
        block = decoder.layers[number]
        return LayerWeights(
            attention_norm=layer_norm(block.norm1),
            query=linear(block.self_attn.q_proj),
            key=linear(block.self_attn.k_proj),
            value=linear(block.self_attn.v_proj),
            output=linear(block.self_attn.out_proj),
            inner_norm=layer_norm(block.norm2),
            inner=linear(block.linear1),
            outer=linear(block.linear2),
        )

    return DecoderDescription(
        shape=DecoderShape(
            num_layers=config.num_hidden_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=config.hidden_size // num_heads,
            activation=_ACTIVATIONS[config.hidden_act],
            gated=False,
            norm_first=config.normalize_before,
            max_positions=config.max_position_embeddings,
        ),
        embedding=array(embeddings.word_embeddings.weight),
        layer=layer,
        final_norm=None if decoder.final_layer_norm is None else layer_norm(decoder.final_layer_norm),
        head=None if config.tie_word_embeddings else array(model.lm_head.decoder_weight).T,
        positions=array(embeddings.position_embeddings.weight)[POSITION_OFFSET:],
        project_in=None if embeddings.project_in is None else linear(embeddings.project_in),
        project_out=None if decoder.project_out is None else linear(decoder.project_out),
    )
