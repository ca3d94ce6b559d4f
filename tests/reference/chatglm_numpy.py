"""ChatGLM-6B's forward pass, from its published description, under the published names of its weights.

A prompt is read in both directions, what stands from <sop> on from left to right (Du et al., "GLM", 2022). Heads turn by
two positions, a half by each; rotary pairs are a place and that a quarter of the head behind it; their frequencies have
the digits of float16, as in the published code and files. Norms stand before the branches, which are added to
sqrt(2 x layers) times the norm's result. GELU in its tanh form; the embedding is the output layer. Rows of `ids` are texts
with padding behind them, if any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def logits(weights: Mapping[str, Any], ids: np.ndarray, config: Mapping[str, Any], xp: Any = np) -> Any:
    """[batch, length, vocabulary] for ids [batch, length]; `config` is the published config.json."""
    batch, length = ids.shape
    num_heads, epsilon = config["num_attention_heads"], config["layernorm_epsilon"]
    factor = math.sqrt(2 * config["num_layers"])
    table = weights["transformer.word_embeddings.weight"]
    hidden = table[ids]
    places = [two_positions(row, config) for row in ids.tolist()]
    seen = xp.asarray(np.stack([visible(row, config) for row in ids.tolist()])[:, None])
    head_dim = hidden.shape[-1] // num_heads
    turns = [
        _turns(np.array([place[part] for place in places]), head_dim // 2, xp, hidden) for part in (0, 1)
    ]
    for number in range(config["num_layers"]):
        layer = f"transformer.layers.{number}."

        def linear(x: Any, name: str, layer: str = layer) -> Any:
            return x @ weights[f"{layer}{name}.weight"].T + weights[f"{layer}{name}.bias"]

        normed = _norm(hidden, weights, layer + "input_layernorm", epsilon, xp)
        joined = linear(normed, "attention.query_key_value").reshape((batch, length, num_heads, 3 * head_dim))
        query, key, value = (joined[..., part * head_dim : (part + 1) * head_dim] for part in range(3))
        attended = _attend(_turned(query, turns, xp), _turned(key, turns, xp), value, seen, xp)
        hidden = normed * factor + linear(attended, "attention.dense")
        normed = _norm(hidden, weights, layer + "post_attention_layernorm", epsilon, xp)
        inner = linear(normed, "mlp.dense_h_to_4h")
        inner = 0.5 * inner * (1 + xp.tanh(0.7978845608028654 * inner * (1 + 0.044715 * inner * inner)))
        hidden = normed * factor + linear(inner, "mlp.dense_4h_to_h")
    return _norm(hidden, weights, "transformer.final_layernorm", epsilon, xp) @ table.T


def two_positions(row: list[int], config: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The position in the context and that in the answer, of each token."""
    start = row.index(config["bos_token_id"])
    mark = config["gmask_token_id"] if config["gmask_token_id"] in row else config["mask_token_id"]
    first = [place if place < start else row.index(mark) for place in range(len(row))]
    return first, [0 if place < start else place - start + 1 for place in range(len(row))]


def visible(row: list[int], config: Mapping[str, Any]) -> np.ndarray:
    """bool [length, length], which tokens (second axis) a token sees: the context, and what lies before it."""
    start = row.index(config["bos_token_id"])
    return np.array([[key < start or key <= query for key in range(len(row))] for query in range(len(row))])


def _norm(x: Any, weights: Mapping[str, Any], name: str, epsilon: float, xp: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    scale = xp.sqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _turns(positions: np.ndarray, size: int, xp: Any, like: Any) -> tuple[Any, Any]:
    """Cosine and sine [batch, length, 1, size / 2]."""
    frequencies = np.float16(10000.0 ** (-np.arange(0, size, 2) / size)).astype(np.float64)
    angles = positions[:, :, None, None] * frequencies
    return xp.asarray(np.cos(angles), dtype=like.dtype), xp.asarray(np.sin(angles), dtype=like.dtype)


def _turned(heads: Any, turns: list[tuple[Any, Any]], xp: Any) -> Any:
    """Heads [batch, length, heads, head dim] with each half turned by its position."""
    quarter = heads.shape[-1] // 4
    parts = [heads[..., place * quarter : (place + 1) * quarter] for place in range(4)]
    turned = []
    for (cosine, sine), first, second in zip(turns, parts[::2], parts[1::2], strict=True):
        turned += [first * cosine - second * sine, second * cosine + first * sine]
    return xp.concatenate(turned, -1)


def _attend(query: Any, key: Any, value: Any, seen: Any, xp: Any) -> Any:
    query, key, value = (part.swapaxes(1, 2) for part in (query, key, value))
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    scores = xp.where(seen, scores, xp.full_like(scores, -1e30))
    shares = xp.exp(scores - xp.amax(scores, axis=-1, keepdims=True))
    attended = (shares / shares.sum(-1, keepdims=True)) @ value
    batch, heads, length, size = attended.shape
    return attended.swapaxes(1, 2).reshape((batch, length, heads * size))
