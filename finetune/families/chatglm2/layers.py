"""ChatGLM2 with faults of PaddleNLP's model put right.

With flash attention PaddleNLP reads the result, [batch, length, ...], as [length, batch, ...], so that the
rows of a batch are mixed up (logits of a tiny model off by 6; a batch of one is right). Its forward pass builds a
dense mask whether one is needed or not. Its functions that cut fused weights for tensor parallelism take Paddle
tensors only, while checkpoints are read as arrays. It rounds cos and sin of the positions to the type of the run, and
it knows no other rotary base and no divided positions, which the models of long texts have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import paddle
from paddlenlp.transformers.chatglm_v2 import modeling

from finetune.families.attention import (
    HALF_TYPES,
    additive,
    causal_mask,
    fused_attention,
    plain_attention,
    refuse_packed_rows,
    visible_keys,
)
from finetune.families.chatglm2.generation import PLAIN_BASE, rotary_facts
from finetune.families.rotary import turn
from finetune.machine.stand_ins import replace

_stock_turn = modeling.apply_rotary_pos_emb


def apply_rotary_pos_emb(x: paddle.Tensor, table: paddle.Tensor) -> paddle.Tensor:
    """Turns neighbouring places of the first part of each head.

    Args:
        x: [length, batch, heads, head dim].
        table: [length, batch or 1, turned places / 2, 2] of cos and sin.

    Returns:
        Shape and type of x.
    """
    if x.dtype not in HALF_TYPES:
        return _stock_turn(x, table)
    cos, sin = (table[..., part].repeat_interleave(2, axis=-1).unsqueeze(2) for part in (0, 1))
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return paddle.concat([turn(turned, cos, sin, halves=False), rest], axis=-1)


replace(modeling, "apply_rotary_pos_emb", apply_rotary_pos_emb)


class RotaryEmbedding(modeling.RotaryEmbedding):
    """Tables of the positions, worked out in every pass; `base` and `divisor` as `rotary_facts` has them."""

    base, divisor = PLAIN_BASE, 1.0

    def forward(self, max_seq_len: int, offset: int = 0) -> paddle.Tensor:
        """Cos and sin, float32 [positions, turned places / 2, 2]."""
        with paddle.amp.auto_cast(enable=False):
            exponents = paddle.arange(0, self.dim, 2, dtype="float32") / self.dim
            places = paddle.arange(0, max_seq_len, dtype="float32") / self.divisor
            angles = paddle.outer(places, 1.0 / (self.base**exponents))
            return paddle.stack([paddle.cos(angles), paddle.sin(angles)], axis=-1)


class CoreAttention(modeling.CoreAttention):
    """The core of attention, with the axes that the layers around it expect."""

    def forward(
        self, query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, visible: paddle.Tensor
    ) -> paddle.Tensor:
        """[length, batch, heads, head dim] each -> [length, batch, hidden]; `visible` as in `attention`."""
        fused = self.config.use_flash_attention
        if not fused and query.dtype not in HALF_TYPES:
            return super().forward(query, key, value, visible)
        query, key, value = (
            part.transpose([1, 0, 2, 3]) for part in (query, key, value)
        )  # [batch, length, heads, head dim] each
        if fused:
            rate = self.config.attention_dropout if self.training else 0.0
            output = fused_attention(query, key, value, visible, drop_rate=rate)
        else:
            output = plain_attention(query, key, value, visible, drop=self._drop)
        output = output.transpose([1, 0, 2, 3]).flatten(2)  # [length, batch, hidden]
        return output.flatten(0, 1) if self.config.sequence_parallel else output

    def _drop(self, weights: paddle.Tensor) -> paddle.Tensor:
        with modeling.seed_guard_context("local_seed"):
            return self.attention_dropout(weights)


class GLMTransformer(modeling.GLMTransformer):
    """The layers, called with a mask in any of the forms of `finetune.families.attention`."""

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Any,
        rotary_pos_emb: Any,
        kv_caches: Any = None,
        use_cache: bool | None = True,
        output_hidden_states: bool | None = False,
    ) -> tuple[Any, Any, None, None]:
        """Hidden states, keys and values of every layer (None without `use_cache`), and twice None."""
        cache: tuple[Any, ...] = ()
        for index in range(self.num_hidden_layers):
            layer = self._get_layer(index)
            past = kv_caches[index] if kv_caches else None
            recomputed = self.enable_recompute and self.recompute_granularity == "full"
            if recomputed and index not in self.no_recompute_layers and not hidden_states.stop_gradient:
                run = partial(self.recompute_training, layer)
            else:
                run = layer
            hidden_states, new = run(
                hidden_states, attention_mask, rotary_pos_emb, kv_cache=past, use_cache=use_cache
            )
            cache += (new,) if use_cache else ()
        if self.post_layer_norm:
            hidden_states = self.final_layernorm(hidden_states)
        return hidden_states, cache if use_cache else None, None, None


class ChatGLMv2Model(modeling.ChatGLMv2Model):
    """The decoder."""

    def get_masks(self, input_ids: Any, past_key_values: Any, padding_mask: Any = None) -> Any:
        """What the layers get as their mask; called by PaddleNLP's forward pass."""
        shape = tuple(input_ids.shape)
        past_length = past_key_values[0][0].shape[0] if past_key_values else 0
        if self.config.use_flash_attention:
            return visible_keys(padding_mask, shape, past_length)
        refuse_packed_rows(padding_mask)
        # Added to float32 scores.
        return additive(causal_mask(padding_mask, shape, past_length), paddle.float32)


class ChatGLMv2ForCausalLM(modeling.ChatGLMv2ForCausalLM):
    """ChatGLM2 built on the layers above."""

    def __init__(self, config: Any):
        super().__init__(config)
        decoder = self.chatglm_v2
        decoder.__class__, decoder.encoder.__class__ = ChatGLMv2Model, GLMTransformer
        decoder.rotary_pos_emb.__class__ = RotaryEmbedding
        decoder.rotary_pos_emb.base, decoder.rotary_pos_emb.divisor = rotary_facts(config)
        # The layers call their core, which chooses the kernel.
        plain = copy.copy(config)
        plain.use_flash_attention = False
        for layer in decoder.encoder.layers:
            layer.self_attention.config = plain
            layer.self_attention.core_attention.__class__ = CoreAttention

    def forward(
        self,
        input_ids: Any = None,
        position_ids: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        *,
        attn_mask_startend_row_indices: Any = None,
        **more: Any,
    ) -> Any:
        """Logits [batch, length, vocabulary] first.

        Args:
            input_ids: [batch, length].
            position_ids: [batch, length].
            attention_mask: A mask or end rows; see `finetune.families.attention.visible_keys`.
            past_key_values: Per layer key and value [past, batch, groups, head dim].
            attn_mask_startend_row_indices: End rows of packed samples, int32 [batch, 1, length].
            **more: As PaddleNLP's.
        """
        if attn_mask_startend_row_indices is not None:
            attention_mask = attn_mask_startend_row_indices
        return super().forward(input_ids, position_ids, attention_mask, past_key_values, **more)

    @classmethod
    def _get_tensor_parallel_mappings(
        cls, config: Any, is_split: bool = True
    ) -> dict[str, Callable[[Any], Any]]:
        actions = super()._get_tensor_parallel_mappings(config, is_split=is_split)
        return (
            {name: partial(_on_tensor, action) for name, action in actions.items()} if is_split else actions
        )


def _on_tensor(action: Callable[[Any], Any], weight: Any) -> Any:
    if not isinstance(weight, np.ndarray):
        return action(weight)
    return np.asarray(action(paddle.to_tensor(weight, place=paddle.CPUPlace())))
