"""Mistral with what PaddleNLP's lacks.

That is the sliding window, one count of positions in training and generation under prefix tuning, bool
block masks, and recomputation that lets gradients reach a prefix.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.distributed.fleet.utils import recompute
from paddlenlp.transformers.mistral import modeling


class PrefixKeyValues(tuple):
    """Keys and values of a trained prefix, which take no positions: the first token stays position 0.

    PaddleNLP's Mistral counts them in training but not in generation, so that a prefix meets other
    positions than it was trained with.
    """


def prefix_key_values(prefix: paddle.Tensor) -> PrefixKeyValues:
    """(batch, prefix length, 2 x layers, kv heads, head dim) -> per layer (batch, kv heads, length, dim)."""
    keys, values = paddle.transpose(prefix, [2, 0, 3, 1, 4]).split(2)
    return PrefixKeyValues(zip(keys, values, strict=True))


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
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, length = hidden.shape[:2]
        past_length = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        if position_ids is None:
            first = 0 if isinstance(past_key_values, PrefixKeyValues) else past_length
            position_ids = paddle.arange(first, first + length).expand([batch_size, length])
        mask = self._additive_mask(attention_mask, (batch_size, length), past_length, hidden.dtype)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache: tuple = ()
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

    def _additive_mask(
        self, attention_mask: Any, shape: tuple[int, int], past_length: int, dtype: Any
    ) -> paddle.Tensor:
        """[batch, 1, queries, keys]: 0 for what may be seen, the type's minimum elsewhere."""
        batch_size, num_queries = shape
        num_keys = num_queries + past_length
        places = paddle.arange(past_length, num_keys).unsqueeze(1)  # [queries, 1]
        keys = paddle.arange(num_keys).unsqueeze(0)
        visible = keys <= places
        if self.config.sliding_window:
            visible = visible & (keys > places - self.config.sliding_window)
        visible = visible.reshape([1, 1, num_queries, num_keys])
        if attention_mask is not None:
            given = attention_mask.astype("bool")
            axes = {2: [1, 2], 3: [1], 4: []}[given.ndim]
            visible = visible & (given.unsqueeze(axes) if axes else given)
        visible = visible.expand([batch_size, 1, num_queries, num_keys])
        return paddle.where(visible, 0.0, paddle.finfo(dtype).min).astype(dtype)


class MistralForCausalLM(modeling.MistralForCausalLM):
    """Mistral with its output layer, built on the decoder above."""

    def __init__(self, config: Any):
        super(modeling.MistralForCausalLM, self).__init__(config)
        self.mistral = MistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = modeling.MistralLMHead(config)
        self.criterion = modeling.MistralPretrainingCriterion(config)

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of one decoding step; positions follow the mask where none were given."""
        if kwargs.get("position_ids") is None:
            mask = kwargs.get("attention_mask")
            tokens = paddle.ones_like(input_ids) if mask is None else mask.astype("int64")
            kwargs["position_ids"] = (tokens.cumsum(axis=-1) - 1).clip(min=0)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)
