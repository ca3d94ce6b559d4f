"""Mistral with what PaddleNLP's lacks.

That is the sliding window, one count of positions in training and generation under prefix tuning, bool
block masks, recomputation that lets gradients reach a prefix, packed rows under fused attention, and float32 where
half precision is too coarse (`rotary`, `attention`).
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.distributed.fleet.utils import recompute
from paddlenlp.transformers.mistral import modeling

from finetune.families.attention import (
    fused_attention,
    plain_attention,
    visible_in_window,
)
from finetune.families.rotary import keep_tables, turn_in_float32

turn_in_float32(modeling, head_axis=1)


class PrefixKeyValues(tuple[Any, ...]):
    """Keys and values of a trained prefix, which take no positions: the first token stays position 0.

    PaddleNLP's Mistral counts them in training but not in generation, so that a prefix meets other
    positions than it was trained with.
    """


def prefix_key_values(prefix: paddle.Tensor) -> PrefixKeyValues:
    """(batch, prefix length, 2 x layers, kv heads, head dim) -> per layer (batch, kv heads, length, dim)."""
    keys, values = paddle.transpose(prefix, [2, 0, 3, 1, 4]).split(2)
    return PrefixKeyValues(zip(keys, values, strict=True))


class MistralAttention(modeling.MistralAttention):
    """Grouped-query attention whose mask has any of the forms of `finetune.families.attention`."""

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> tuple[Any, Any, Any]:
        """Output [batch, length, hidden], None, and keys and values [batch, kv heads, keys, head dim] or None."""
        batch_size, length = hidden_states.shape[:2]
        query, key, value = (
            layer(hidden_states).reshape([batch_size, length, -1, self.head_dim]).transpose([0, 2, 1, 3])
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        past_length = past_key_value[0].shape[2] if past_key_value is not None else 0
        cos, sin = self.rotary_emb(value, seq_len=past_length + length)
        query, key = modeling.apply_rotary_pos_emb(query, key, cos, sin, position_ids)
        if past_key_value is not None:
            key, value = (
                paddle.concat([past, new], axis=2)
                for past, new in zip(past_key_value, (key, value), strict=True)
            )
        attend = fused_attention if self.config.use_flash_attention else plain_attention
        # [batch, length or keys, heads or kv heads, head dim]
        first, second, third = (part.transpose([0, 2, 1, 3]) for part in (query, key, value))
        output = attend(first, second, third, attention_mask)
        return self.o_proj(output.flatten(2)), None, (key, value) if use_cache else None


class MistralModel(modeling.MistralModel):
    """Mistral's decoder with the sliding window of the published model.

    A token sees the last `sliding_window` tokens, itself included (Jiang et al., "Mistral 7B", 2023).
    """

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        *,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        **unused: Any,
    ) -> tuple[Any, ...]:
        """(hidden states,) or, with `use_cache`, (hidden states, keys and values of every layer).

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, past + length] with 1 for tokens, or [batch, 1, length, past + length],
                true for what may be seen. None: all tokens.
            position_ids: [batch, length]; behind the past, or from 0 behind a prefix, when not given.
            past_key_values: Per layer key and value [batch, kv heads, past, head dim].
            inputs_embeds: Word embeddings [batch, length, hidden] instead of `input_ids`.
            use_cache: Return keys and values.
            **unused: PaddleNLP's requests for all hidden states and attentions, which nothing here makes.
        """
        hidden = (
            self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        )  # [batch, length, hidden]
        batch_size, length = hidden.shape[:2]
        past_length = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        first = 0 if isinstance(past_key_values, PrefixKeyValues) else past_length
        if position_ids is None:
            position_ids = paddle.arange(first, first + length).expand(
                [batch_size, length]
            )  # [batch, length]
        mask = self._visible(
            attention_mask, position_ids + (past_length - first), (batch_size, length), past_length
        )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache: tuple[Any, ...] = ()
        for index, layer in enumerate(self.layers):
            past = past_key_values[index] if past_key_values is not None else None
            if self.enable_recompute and self.training:
                hidden = recompute(layer, hidden, mask, position_ids, past, use_reentrant=False)[0]
                continue
            outputs = layer(hidden, mask, position_ids, past, use_cache=use_cache)
            hidden = outputs[0]
            cache += (outputs[1],) if use_cache else ()
        hidden = self.norm(hidden)
        return (hidden, cache) if cache else (hidden,)

    def _visible(self, given: Any, places: Any, shape: tuple[int, int], past_length: int) -> Any:
        """What the layers get as their mask, the window in it; see `visible_in_window`."""
        window, fused = self.config.sliding_window, self.config.use_flash_attention
        return visible_in_window(given, shape, past_length, places=places, window=window, fused=fused)


class MistralForCausalLM(modeling.MistralForCausalLM):
    """Mistral with its output layer, built on the decoder above."""

    def __init__(self, config: Any):
        super(modeling.MistralForCausalLM, self).__init__(config)
        self.mistral = MistralModel(config)
        for layer in self.mistral.layers:
            attention = layer.self_attn
            attention.__class__ = MistralAttention
            # Made anew: PaddleNLP has rounded them to the type that the model is built in.
            attention.rotary_emb._set_cos_sin_cache(config.max_position_embeddings, paddle.float32)
            keep_tables(attention.rotary_emb)
        self.vocab_size = config.vocab_size
        self.lm_head = modeling.MistralLMHead(config)
        self.criterion = modeling.MistralPretrainingCriterion(config)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        *,
        attn_mask_startend_row_indices: Any = None,
        **more: Any,
    ) -> Any:
        """Logits [batch, length, vocabulary] first; see `MistralModel.forward`.

        Args:
            input_ids: [batch, length].
            attention_mask: A mask or end rows.
            position_ids: [batch, length].
            past_key_values: Keys and values so far.
            attn_mask_startend_row_indices: End rows of packed samples, int32 [batch, 1, length].
            **more: As PaddleNLP's.
        """
        if attn_mask_startend_row_indices is not None:
            attention_mask = attn_mask_startend_row_indices
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, **more)

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of one decoding step; positions follow the mask where none were given."""
        if kwargs.get("position_ids") is None:
            mask = kwargs.get("attention_mask")
            tokens = paddle.ones_like(input_ids) if mask is None else mask.astype("int64")
            kwargs["position_ids"] = (tokens.cumsum(axis=-1) - 1).clip(min=0)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return inputs
