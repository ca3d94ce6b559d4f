"""BLOOM for the static-graph export."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddlenlp.transformers.bloom import modeling

from finetune.families.decoder_description import (
    DecoderDescription,
    DecoderShape,
    LayerWeights,
    Linear,
    array,
    layer_norm,
    linear,
)


def describe(model: Any) -> DecoderDescription:
    """The description of a BLOOM."""
    config, decoder = model.config, model.bloom
    num_heads = config.n_head
    head_dim = config.hidden_size // num_heads

    def layer(number: int) -> LayerWeights:
        block = decoder.h[number]
        query, key, value = _parts(linear(block.self_attention.query_key_value), num_heads, head_dim)
        return LayerWeights(
            attention_norm=layer_norm(block.input_layernorm),
            query=query,
            key=key,
            value=value,
            output=linear(block.self_attention.dense),
            inner_norm=layer_norm(block.post_attention_layernorm),
            inner=linear(block.mlp.dense_h_to_4h),
            outer=linear(block.mlp.dense_4h_to_h),
        )

    pair = paddle.ones([1, 2], dtype="bool")
    return DecoderDescription(
        shape=DecoderShape(
            num_layers=config.n_layer,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            activation="gelu_tanh",
            gated=False,
            residual_from_norm=config.apply_residual_connection_post_layernorm,
        ),
        embedding=array(decoder.word_embeddings.weight),
        layer=layer,
        final_norm=layer_norm(decoder.ln_f),
        head=None,
        embedding_norm=layer_norm(decoder.word_embeddings_layernorm),
        # The slope is the difference between two neighbouring keys.
        distance_slopes=array(modeling.build_alibi_tensor(pair, num_heads, paddle.float32)[0, :, 1]),
    )


def _parts(fused: Linear, num_heads: int, head_dim: int) -> tuple[Linear, ...]:
    """Queries, keys and values, which the fused layer holds head by head."""
    weight = fused.weight.reshape(-1, num_heads, 3, head_dim)
    bias = None if fused.bias is None else fused.bias.reshape(num_heads, 3, head_dim)
    return tuple(
        Linear(
            np.ascontiguousarray(weight[:, :, part].reshape(weight.shape[0], -1)),
            None if bias is None else bias[:, part].reshape(-1),
        )
        for part in range(3)
    )
