"""Qwen that trains the same whatever was evaluated before, with one statement of what is seen.

For prompts longer than `seq_length` Qwen stretches its rotary positions (dynamic NTK), outside of training
only. PaddleNLP's layers remember the last stretch and go on with it in training.

PaddleNLP's forward pass builds a dense causal mask in every pass, with which no fused kernel is quick; here it is
known from what was given (`attention`). Scores and rotary positions are float32 (`rotary`).
"""

from __future__ import annotations

import functools
from typing import Any

from paddle.distributed.fleet.utils.sequence_parallel_utils import ScatterOp
from paddlenlp.transformers.qwen import modeling

from finetune.families.attention import (
    HALF_TYPES,
    additive,
    causal_mask,
    fused_attention,
    plain_attention,
    refuse_packed_rows,
    visible_keys,
)
from finetune.families.gated_layers import keep_rotary_tables
from finetune.families.rotary import turn_in_float32

turn_in_float32(modeling)


class QWenModel(modeling.QWenModel):
    """Qwen's decoder."""

    def forward(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        **unused: Any,
    ) -> tuple[Any, ...]:
        """(hidden states,) or, with `use_cache`, (hidden states, keys and values of every layer).

        Args:
            input_ids: [batch, length].
            past_key_values: Per layer key and value [batch, past, heads, head dim].
            attention_mask: See `finetune.families.attention.visible_keys`.
            position_ids: [batch, length].
            inputs_embeds: Word embeddings [batch, length, hidden] instead of `input_ids`.
            use_cache: Return keys and values.
            **unused: PaddleNLP's requests for all hidden states and attentions, which nothing here makes.
        """
        hidden = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # [batch, length, hidden]
        shape = tuple(hidden.shape[:2])
        past_length = past_key_values[0][0].shape[1] if past_key_values is not None else 0
        visible = self._visible(attention_mask, shape, past_length, hidden.dtype)
        if self.sequence_parallel:
            hidden = ScatterOp.apply(hidden.flatten(0, 1))  # [batch * length / ranks, hidden]
        hidden = self.drop(hidden)
        recomputed = self.enable_recompute and self.training
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not recomputed
        cache: tuple[Any, ...] = ()
        for index, block in enumerate(self.h):
            past = past_key_values[index] if past_key_values is not None else None
            arguments = (hidden, past, visible, position_ids, None, None, use_cache, False)
            if recomputed and not hidden.stop_gradient and self.recompute_granularity == "full":
                outputs = self.recompute_training(block, *arguments)
            else:
                outputs = block(*arguments)
            hidden = outputs[0] if isinstance(outputs, tuple) else outputs
            cache += (outputs[1],) if use_cache else ()
        hidden = self.ln_f(hidden)
        return (hidden, cache) if use_cache else (hidden,)

    def _visible(self, given: Any, shape: tuple[int, int], past_length: int, dtype: Any) -> Any:
        """What the layers get as their mask."""
        if self.config.use_flash_attention:
            return visible_keys(given, shape, past_length)
        refuse_packed_rows(given)
        return additive(causal_mask(given, shape, past_length), dtype)


class QWenForCausalLM(modeling.QWenForCausalLM):
    """Qwen with its output layer, built on the decoder above."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.qwen.__class__ = QWenModel
        keep_rotary_tables(self)
        for block in self.qwen.h:
            block.attn.register_forward_pre_hook(_forget_stretch)
            block.attn._attn = functools.partial(_attend, block.attn)

    def forward(
        self,
        input_ids: Any = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        attn_mask_startend_row_indices: Any = None,
        **more: Any,
    ) -> Any:
        """Logits [batch, length, vocabulary] first; see `QWenModel.forward`.

        Args:
            input_ids: [batch, length].
            past_key_values: Keys and values so far.
            attention_mask: A mask or end rows.
            position_ids: [batch, length].
            attn_mask_startend_row_indices: End rows of packed samples, int32 [batch, 1, length].
            **more: As PaddleNLP's.
        """
        if attn_mask_startend_row_indices is not None:
            attention_mask = attn_mask_startend_row_indices
        return super().forward(input_ids, past_key_values, attention_mask, position_ids, **more)


def _attend(layer: Any, query: Any, key: Any, value: Any, visible: Any = None) -> tuple[Any, None]:
    """The core of an attention layer: [batch, length, heads, head dim] each -> ([batch, length, hidden], None)."""
    if layer.config.use_flash_attention:
        rate = layer.config.attn_dropout_prob if layer.training else 0.0
        output = fused_attention(query, key, value, visible, drop_rate=rate)
    elif query.dtype in HALF_TYPES:
        output = plain_attention(query, key, value, visible, drop=layer.attn_dropout)
    else:
        stock: tuple[Any, None] = modeling.QWenAttention._attn(layer, query, key, value, visible)
        return stock
    output = output.flatten(2)  # [batch, length, hidden]
    return (output.flatten(0, 1) if layer.sequence_parallel else output), None


def _forget_stretch(attention: Any, _inputs: tuple[Any, ...]) -> None:
    if attention.training:
        attention._ntk_cached = 1.0
