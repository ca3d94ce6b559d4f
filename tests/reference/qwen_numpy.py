"""Qwen's (v1) forward pass, from its published description, under the published names of its weights.

Pre-norm blocks with RMSNorm; one projection with bias for queries, keys and values; rotary positions (Su et
al., "RoFormer", 2021) on whole heads, halves against halves; SwiGLU (Shazeer, "GLU Variants Improve
Transformer", 2020) in which w2 is activated and w1 is the factor; no bias elsewhere; output weights of its
own. The scalings for sequences longer than `seq_length` (dynamic NTK, log n) are 1 within it and left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.reference.chatglm2_qwen_layers import causal_attention, rms_norm, rotate_halves, rotation, silu


def logits(weights: Mapping[str, Any], ids: np.ndarray, config: Mapping[str, Any], xp: Any = np) -> Any:
    """[batch, length, vocabulary] for ids [batch, length].

    `config` is the published config.json.
    """
    heads, head_dim, epsilon = (
        config[name] for name in ("num_attention_heads", "kv_channels", "layer_norm_epsilon")
    )
    hidden = weights["transformer.wte.weight"][ids]
    batch, length = ids.shape
    cosine, sine = rotation(length, head_dim, xp, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.h.{layer}."
        x = rms_norm(hidden, weights[prefix + "ln_1.weight"], epsilon=epsilon, xp=xp)
        joined = x @ weights[prefix + "attn.c_attn.weight"].T + weights[prefix + "attn.c_attn.bias"]
        parts = joined.reshape((batch, length, 3, heads, head_dim))
        query, key, value = (parts[:, :, place] for place in range(3))
        query, key = (rotate_halves(part, cosine, sine, xp) for part in (query, key))
        hidden = hidden + causal_attention(query, key, value, xp) @ weights[prefix + "attn.c_proj.weight"].T
        x = rms_norm(hidden, weights[prefix + "ln_2.weight"], epsilon=epsilon, xp=xp)
        factor = x @ weights[prefix + "mlp.w1.weight"].T
        gate = silu(x @ weights[prefix + "mlp.w2.weight"].T, xp)
        hidden = hidden + (factor * gate) @ weights[prefix + "mlp.c_proj.weight"].T
    final = rms_norm(hidden, weights["transformer.ln_f.weight"], epsilon=epsilon, xp=xp)
    return final @ weights["lm_head.weight"].T
