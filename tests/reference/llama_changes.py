"""transformers' Llama with the layers of published models that it has no code of: joined projections, another head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class _Part(nn.Module):
    """Some outputs of an attention's joined layer, in the place of a layer of its own."""

    def __init__(self, attention: Any, rows: torch.Tensor):
        super().__init__()
        self._attention, self._rows = [attention], rows  # in a list: not as a module in this one

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._attention[0].qkv(hidden)[..., self._rows]


def join_inputs(model: Any, *, grouped: bool) -> None:
    """Gives every attention one layer `qkv`.

    Args:
        model: The Llama.
        grouped: Whether it holds the queries of a key head, its key, its value, then the next key head's; else all
            queries, then all keys, then all values.
    """
    config = model.config
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = config.hidden_size // num_heads
    rows = torch.arange((num_heads + 2 * num_kv_heads) * head_dim)
    if grouped:
        groups = rows.reshape(num_kv_heads, -1, head_dim)
        parts = [groups[:, :-2].reshape(-1), groups[:, -2].reshape(-1), groups[:, -1].reshape(-1)]
    else:
        parts = list(rows.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]))
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.qkv = nn.Linear(config.hidden_size, len(rows), bias=False)
        attention.q_proj, attention.k_proj, attention.v_proj = (_Part(attention, part) for part in parts)


class _NormedHead(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


def norm_head(model: Any) -> None:
    """Lets the output layer divide the weights of each token by their length."""
    model.lm_head.__class__ = _NormedHead


def add_distances(model: Any) -> None:
    """Puts distances to the keys (ALiBi, Press et al. 2022) in the place of rotary positions."""
    num_heads = model.config.num_attention_heads
    slopes = torch.tensor(_slopes(num_heads))
    turn = model.model.rotary_emb.forward
    stock = model.forward

    def stay(hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = turn(hidden, position_ids)
        return torch.ones_like(cos), torch.zeros_like(sin)

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: Any) -> Any:
        length = input_ids.shape[1]
        keys = torch.arange(length)
        bias = slopes[:, None, None] * (keys[None, :] - keys[:, None])  # [heads, queries, keys]
        seen = (keys[None, :] <= keys[:, None]) & attention_mask[:, None, None, :].bool()
        lowest = torch.finfo(torch.float32).min
        return stock(input_ids=input_ids, attention_mask=torch.where(seen, bias[None], lowest), **more)

    model.model.rotary_emb.forward = stay
    model.forward = forward


def _slopes(num_heads: int) -> list[float]:
    """2^(-8i / n) for a power of two; else those of the power below, and every other one of the power above."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * place / power) for place in range(1, power + 1)]
    return slopes + [2 ** (-4 * place / power) for place in range(1, 2 * (num_heads - power), 2)]
