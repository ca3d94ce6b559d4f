"""What the two reference models share, in operations that NumPy and PyTorch spell alike.

Every function takes arrays of either library; `xp` is the library. Linear weights are [out, in], as in the
published files.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def rms_norm(x: Any, weight: Any, *, epsilon: float, xp: Any) -> Any:
    """Root mean square norm (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + epsilon) * weight."""
    return x / xp.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def silu(x: Any, xp: Any) -> Any:
    """x * sigmoid(x)."""
    return x / (1 + xp.exp(-x))


def rotation(
    length: int, num_rotated: int, xp: Any, like: Any, *, base: float = 10000.0, divisor: float = 1.0
) -> tuple[Any, Any]:
    """Cosine and sine [length, 1, num_rotated / 2] of position / divisor x base^(-2 i / num_rotated)."""
    frequencies = base ** (-np.arange(0, num_rotated, 2) / num_rotated)
    angles = np.arange(length)[:, None, None] / divisor * frequencies
    kind = {"dtype": like.dtype}
    return xp.asarray(np.cos(angles), **kind), xp.asarray(np.sin(angles), **kind)


def rotate_pairs(x: Any, cosine: Any, sine: Any, xp: Any) -> Any:
    """Rotates the neighbours (0, 1), (2, 3), ... of the first features; the rest pass unchanged.

    x is [batch, length, heads, head dim].
    """
    num_rotated = 2 * cosine.shape[-1]
    even, odd = x[..., 0:num_rotated:2], x[..., 1:num_rotated:2]
    turned = xp.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1)
    return xp.concatenate([turned.reshape((*x.shape[:-1], num_rotated)), x[..., num_rotated:]], -1)


def rotate_halves(x: Any, cosine: Any, sine: Any, xp: Any) -> Any:
    """Rotates feature i with feature i + half, as in GPT-NeoX."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return xp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def causal_attention(query: Any, key: Any, value: Any, xp: Any) -> Any:
    """Softmax attention; key and value heads are shared by equal runs of query heads.

    query is [batch, length, heads, head dim], key and value [batch, length, groups, head dim]; the result
    is [batch, length, heads x head dim].
    """
    batch, length, num_heads, head_dim = query.shape
    shared = np.arange(num_heads) // (num_heads // key.shape[2])
    query, key, value = (part.swapaxes(1, 2) for part in (query, key[:, :, shared], value[:, :, shared]))
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(head_dim)
    future = xp.asarray(np.triu(np.ones((length, length), dtype=bool), 1))
    scores = xp.where(future, xp.full_like(scores, -1e30), scores)
    weights = xp.exp(scores - xp.amax(scores, axis=-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return (weights @ value).swapaxes(1, 2).reshape((batch, length, num_heads * head_dim))
