"""ChatGLM2's forward pass, from its published description, under the published names of its weights.

Pre-norm blocks with RMSNorm; one projection with bias for all queries and for the few shared keys and
values (Shazeer, "Fast Transformer Decoding", 2019; Ainslie et al., "GQA", 2023); rotary positions (Su et
al., "RoFormer", 2021) on the first half of each head, in neighbouring pairs; SwiGLU (Shazeer, "GLU Variants
Improve Transformer", 2020) whose activated half comes first; no bias elsewhere; output weights of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.reference.chatglm2_qwen_layers import causal_attention, rms_norm, rotate_pairs, rotation, silu


def logits(weights: Mapping[str, Any], ids: np.ndarray, config: Mapping[str, Any], xp: Any = np) -> Any:
    """[batch, length, vocabulary] for ids [batch, length].

    `config` is the published config.json.
    """
    heads, groups, head_dim = (
        config[name] for name in ("num_attention_heads", "multi_query_group_num", "kv_channels")
    )
    epsilon = config["layernorm_epsilon"]
    hidden = weights["transformer.embedding.word_embeddings.weight"][ids]
    batch, length = ids.shape
    ratio = config.get("rope_ratio", 1)
    # The published code of ChatGLM3 and GLM-4 multiplies the base, that of ChatGLM2 divides the positions.
    multiplies = config.get("_name_or_path", "").removeprefix("THUDM/").startswith(("chatglm3", "glm-4"))
    stretch = {"base": 10000.0 * ratio} if multiplies else {"divisor": ratio}
    cosine, sine = rotation(length, head_dim // 2, xp, hidden, **stretch)
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        attention = prefix + "self_attention."
        x = rms_norm(hidden, weights[prefix + "input_layernorm.weight"], epsilon=epsilon, xp=xp)
        joined = (
            x @ weights[attention + "query_key_value.weight"].T + weights[attention + "query_key_value.bias"]
        )
        heads_of = joined.reshape((batch, length, heads + 2 * groups, head_dim))
        query, key, value = (
            heads_of[:, :, :heads],
            heads_of[:, :, heads : heads + groups],
            heads_of[:, :, heads + groups :],
        )
        query, key = (rotate_pairs(part, cosine, sine, xp) for part in (query, key))
        hidden = hidden + causal_attention(query, key, value, xp) @ weights[attention + "dense.weight"].T
        x = rms_norm(hidden, weights[prefix + "post_attention_layernorm.weight"], epsilon=epsilon, xp=xp)
        wide = x @ weights[prefix + "mlp.dense_h_to_4h.weight"].T
        inner = wide.shape[-1] // 2
        gated = silu(wide[..., :inner], xp) * wide[..., inner:]
        hidden = hidden + gated @ weights[prefix + "mlp.dense_4h_to_h.weight"].T
    final = weights["transformer.encoder.final_layernorm.weight"]
    return rms_norm(hidden, final, epsilon=epsilon, xp=xp) @ weights["transformer.output_layer.weight"].T
