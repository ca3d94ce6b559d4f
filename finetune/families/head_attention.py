"""Grouped attention whose heads are described by facts, for decoders that PaddleNLP has no model of.

PaddleNLP's layers take the size of a head to be hidden size / heads, turn whole heads and norm none of them. Here
each of these is a fact: the size of a head, biases, an RMS norm of every query and key head, the share of a head that
is turned and which places form a pair, which layers are joined, factors and caps of the scores. The linear layers are Paddle's, tensor-parallel and sequence-parallel forms
among them, so that LoRA, quantised bases and sharding treat them as they do in other families.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from finetune.families.attention import fused_attention, plain_attention
from finetune.families.head_facts import HeadFacts
from finetune.families.head_layers import HeadNorm, column_layer, row_layer
from finetune.families.rotary import turn
from finetune.families.rotary_tables import RotaryTables

__all__ = ["HeadAttention", "HeadFacts"]


class HeadAttention(nn.Layer):
    """Attention of one decoder layer.

    Args:
        config: Sizes and degrees of parallelism.
        facts: How the heads are.
        tables: Rotary positions, shared by layers of a model; None: heads are not turned.
        layerwise_recompute: Whether this layer may be computed again in the backward pass.
    """

    def __init__(
        self, config: Any, facts: HeadFacts, tables: RotaryTables | None, *, layerwise_recompute: bool
    ):
        super().__init__()
        self.config, self.facts, self.tables = config, facts, tables
        degree = max(config.tensor_parallel_degree, 1)
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // degree
        self.num_kv_heads = config.num_key_value_heads // degree
        # Read and set from outside: by recomputation, and by rows of changing length (sequence parallelism).
        self.enable_recompute, self.layerwise_recompute = False, layerwise_recompute
        self.seq_length = config.seq_length
        hidden, queries = config.hidden_size, config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        if facts.joined_input:
            self.query_key_value_proj = column_layer(
                config, hidden, queries + 2 * keys, has_bias=facts.input_bias
            )
        elif config.fuse_attention_qkv:
            # The queries of a key head, its key, its value; then the next key head's.
            self.qkv_proj = column_layer(config, hidden, queries + 2 * keys, has_bias=facts.input_bias)
        else:
            self.q_proj = column_layer(config, hidden, queries, has_bias=facts.input_bias)
            self.k_proj = column_layer(config, hidden, keys, has_bias=facts.input_bias)
            self.v_proj = column_layer(config, hidden, keys, has_bias=facts.input_bias)
        self.o_proj = row_layer(config, queries, hidden, has_bias=facts.output_bias)
        if facts.normed:
            self.q_norm = HeadNorm(self.head_dim, config.rms_norm_eps, offset=facts.norm_offset)
            self.k_norm = HeadNorm(self.head_dim, config.rms_norm_eps, offset=facts.norm_offset)

    def forward(
        self,
        hidden: Any,
        position_ids: Any,
        past_key_value: Any = None,
        attention_mask: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **unused: Any,
    ) -> Any:
        """Output like `hidden`; with `use_cache` a pair of it and (keys, values).

        Args:
            hidden: [batch, length, hidden]; under sequence parallelism [batch * length / ranks, hidden].
            position_ids: [batch, length].
            past_key_value: Keys and values [batch, past, kv heads, head dim].
            attention_mask: See `finetune.families.attention`.
            output_attentions: PaddleNLP's request for probabilities, which nothing here makes.
            use_cache: Return keys and values.
            **unused: What PaddleNLP's decoder layer hands on besides.
        """
        query, key, value = self._heads(hidden, position_ids)
        if past_key_value is not None:
            key = paddle.concat([past_key_value[0], key], axis=1)  # [batch, keys, kv heads, head dim]
            value = paddle.concat([past_key_value[1], value], axis=1)
        repeated = self.enable_recompute and self.layerwise_recompute and not query.stop_gradient
        if repeated and self.config.recompute_granularity == "core_attn":
            attended = recompute(self._attend, query, key, value, attention_mask)
        else:
            attended = self._attend(query, key, value, attention_mask)
        attended = attended.flatten(2)  # [batch, length, heads * head dim]
        output = self.o_proj(attended.flatten(0, 1) if self.config.sequence_parallel else attended)
        return (output, (key, value)) if use_cache else output

    def _heads(self, hidden: Any, position_ids: Any) -> tuple[Any, Any, Any]:
        """Queries, keys and values [batch, length, heads, head dim] of new tokens, normed and turned."""
        query, key, value = self._projections(hidden)
        if self.facts.normed:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.tables is None:
            return query, key, value
        cos, sin = self.tables.at(position_ids)
        return self._turned(query, cos, sin), self._turned(key, cos, sin), value

    def _turned(self, heads: Any, cos: Any, sin: Any) -> Any:
        turned, halves = cos.shape[-1], self.facts.halves
        if turned == self.head_dim:
            return turn(heads, cos, sin, halves=halves)
        first, rest = heads[..., :turned], heads[..., turned:]
        return paddle.concat([turn(first, cos, sin, halves=halves), rest], axis=-1)

    def _projections(self, hidden: Any) -> tuple[Any, Any, Any]:
        rows = [-1, self.seq_length] if self.config.sequence_parallel else [0, 0]
        if self.facts.joined_input:
            part = self._groups if self.facts.grouped_input else self._parts
            return part(self.query_key_value_proj(hidden), rows)
        if not self.config.fuse_attention_qkv:
            query = self.q_proj(hidden).reshape([*rows, self.num_heads, self.head_dim])
            key = self.k_proj(hidden).reshape([*rows, self.num_kv_heads, self.head_dim])
            return query, key, self.v_proj(hidden).reshape([*rows, self.num_kv_heads, self.head_dim])
        return self._groups(self.qkv_proj(hidden), rows)

    def _groups(self, joined: Any, rows: list[int]) -> tuple[Any, Any, Any]:
        num_groups = self.num_heads // self.num_kv_heads
        joined = joined.reshape([*rows, self.num_kv_heads, num_groups + 2, self.head_dim])
        query, key, value = paddle.split(joined, [num_groups, 1, 1], axis=3)
        return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)

    def _parts(self, joined: Any, rows: list[int]) -> tuple[Any, Any, Any]:
        heads = joined.reshape([*rows, self.num_heads + 2 * self.num_kv_heads, self.head_dim])
        query, key, value = paddle.split(
            heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], axis=2
        )
        return query, key, value

    def _attend(self, query: Any, key: Any, value: Any, visible: Any) -> Any:
        rate = float(getattr(self.config, "attention_dropout", None) or 0.0) if self.training else 0.0
        facts = self.facts
        if self.config.use_flash_attention and facts.score_cap is None:
            if facts.score_scale is not None:
                query = query * (facts.score_scale * self.head_dim**0.5)  # the kernels divide by that root
            return fused_attention(query, key, value, visible, drop_rate=rate)
        # Looked up when called: dropout whose masks follow the samples takes the function's place.
        drop = (lambda weights: F.dropout(weights, p=rate, training=True)) if rate else None
        return plain_attention(
            query, key, value, visible, drop=drop, scale=facts.score_scale, cap=facts.score_cap
        )
