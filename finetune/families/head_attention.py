"""Grouped attention whose heads are described by facts, for decoders that PaddleNLP has no model of.

PaddleNLP's layers take the size of a head to be hidden size / heads, turn whole heads and norm none of them. Here
each of these is a fact: the size of a head, biases, an RMS norm of every query and key head, which places
form a pair and which layers are joined. The linear layers are Paddle's, tensor-parallel and sequence-parallel forms
among them, so that LoRA, quantised bases and sharding treat them as they do in other families.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed.fleet.utils import recompute

from finetune.families.attention import fused_attention, plain_attention
from finetune.families.head_layers import HeadNorm, column_layer, row_layer
from finetune.families.rotary import turn


@dataclass(frozen=True)
class HeadFacts:
    """What tells one family's attention from another's.

    Attributes:
        normed: Whether queries and keys pass an RMS norm over the head before they are turned.
        halves: Whether rotary positions pair place i with place i + head dim / 2; else with its neighbour.
        windowed: Whether config.json's `sliding_window` holds.
        joined_input: Whether one layer gives queries, keys and values, one behind the other.
        joined_inner: Whether one layer gives both halves of the feed-forward layer, the gate's first.
        input_bias: Whether the projections to queries, keys and values have a bias.
        output_bias: Whether the projection back has one.
        inner_bias: Whether the feed-forward layers have biases.
    """

    normed: bool = False
    halves: bool = True
    windowed: bool = False
    joined_input: bool = False
    joined_inner: bool = False
    input_bias: bool = False
    output_bias: bool = False
    inner_bias: bool = False


class RotaryTables:
    """Cosine and sine at the positions of a batch, float32, worked out once for all layers of a model.

    Args:
        base: Of the angles, base^(-2i / head dim), Su et al., "RoFormer" (2021).
        head_dim: Size of a head.
        halves: See `HeadFacts`.
    """

    def __init__(self, base: float, head_dim: int, *, halves: bool):
        self.base, self.head_dim, self.halves = base, head_dim, halves
        self._last: tuple[Any, Any, Any] | None = None

    def at(self, position_ids: Any) -> tuple[Any, Any]:
        """Cosine and sine [batch, length, 1, head dim] at positions [batch, length]."""
        # Every layer is called with the same tensor.
        if self._last is None or self._last[0] is not position_ids:
            self._last = (position_ids, *self._work_out(position_ids))
        return self._last[1:]

    def _work_out(self, position_ids: Any) -> tuple[Any, Any]:
        with paddle.amp.auto_cast(enable=False), paddle.no_grad():
            places = paddle.arange(0, self.head_dim, 2, dtype="float32") / self.head_dim
            frequencies = 1.0 / self.base**places  # [head dim / 2]
            angles = (
                position_ids.astype("float32").unsqueeze(-1) * frequencies
            )  # [batch, length, head dim / 2]
            if self.halves:
                angles = paddle.concat([angles, angles], axis=-1)  # [batch, length, head dim]
            else:
                angles = paddle.stack([angles, angles], axis=-1).flatten(2)
            angles = angles.unsqueeze(2)
            return angles.cos(), angles.sin()


class HeadAttention(nn.Layer):
    """Attention of one decoder layer.

    Args:
        config: Sizes and degrees of parallelism.
        facts: How the heads are.
        tables: Rotary positions, shared by all layers of a model.
        layerwise_recompute: Whether this layer may be computed again in the backward pass.
    """

    def __init__(self, config: Any, facts: HeadFacts, tables: RotaryTables, *, layerwise_recompute: bool):
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
            self.q_norm = HeadNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = HeadNorm(self.head_dim, config.rms_norm_eps)

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
        cos, sin = self.tables.at(position_ids)
        halves = self.facts.halves
        return turn(query, cos, sin, halves=halves), turn(key, cos, sin, halves=halves), value

    def _projections(self, hidden: Any) -> tuple[Any, Any, Any]:
        rows = [-1, self.seq_length] if self.config.sequence_parallel else [0, 0]
        if self.facts.joined_input:
            return self._parts(self.query_key_value_proj(hidden), rows)
        if not self.config.fuse_attention_qkv:
            query = self.q_proj(hidden).reshape([*rows, self.num_heads, self.head_dim])
            key = self.k_proj(hidden).reshape([*rows, self.num_kv_heads, self.head_dim])
            return query, key, self.v_proj(hidden).reshape([*rows, self.num_kv_heads, self.head_dim])
        num_groups = self.num_heads // self.num_kv_heads
        joined = self.qkv_proj(hidden).reshape([*rows, self.num_kv_heads, num_groups + 2, self.head_dim])
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
        if self.config.use_flash_attention:
            return fused_attention(query, key, value, visible, drop_rate=rate)
        # Looked up when called: dropout whose masks follow the samples takes the function's place.
        drop = (lambda weights: F.dropout(weights, p=rate, training=True)) if rate else None
        return plain_attention(query, key, value, visible, drop=drop)
