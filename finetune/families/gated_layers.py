"""The forward pass that PaddleNLP's Llama, Qwen2 and Gemma share, with one statement of what is seen.

PaddleNLP's own passes build a dense mask even where none is needed, ask the device whether it is merely causal (a
pass stops there until the device has caught up), and answer "yes" for a causal mask behind a prefix, which the kernel
then takes for one that starts at the first key. Distances (ALiBi) they keep in the type of the run. Here the mask is
known from what was given: see `finetune.families.attention`.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle.distributed.fleet.utils.sequence_parallel_utils import ScatterOp
from paddlenlp.transformers.llama.modeling import build_alibi_tensor
from paddlenlp.transformers.model_outputs import BaseModelOutputWithPastAndCrossAttentions

from finetune.families.attention import (
    HALF_TYPES,
    distances_and_mask,
    fused_attention,
    plain_attention,
    refuse_packed_rows,
    visible_keys,
)
from finetune.families.rotary import keep_tables
from finetune.machine.stand_ins import replace


def distance_slopes(num_heads: int) -> paddle.Tensor:
    """What a step to the next key adds to the scores of each head, float32 [heads] (ALiBi)."""
    # The difference between two neighbouring keys.
    return build_alibi_tensor(paddle.ones([1, 2], dtype="bool"), num_heads, "float32")[0, :, 0, 1]


class GatedDecoder:
    """`forward` of a decoder; to be named before PaddleNLP's class in a list of base classes."""

    def forward(
        self: Any,
        input_ids: Any = None,
        position_ids: Any = None,
        attention_mask: Any = None,
        *,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        return_dict: bool | None = None,
        attn_mask_startend_row_indices: Any = None,
        **unused: Any,
    ) -> Any:
        """(hidden states,) or, with `use_cache`, (hidden states, keys and values of every layer).

        Args:
            input_ids: [batch, length].
            position_ids: [batch, length]; counted from 0 when not given.
            attention_mask: See `finetune.families.attention.visible_keys`.
            inputs_embeds: Word embeddings [batch, length, hidden] instead of `input_ids`.
            use_cache: Return keys and values.
            past_key_values: Per layer key and value [batch, past, kv heads, head dim].
            return_dict: Return PaddleNLP's output object instead of a tuple.
            attn_mask_startend_row_indices: End rows of packed samples, int32 [batch, 1, length].
            **unused: PaddleNLP's requests for all hidden states and attentions, which nothing here makes.
        """
        hidden = (
            self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        )  # [batch, length, hidden]
        shape = tuple(hidden.shape[:2])
        pasts = [None] * len(self.layers) if past_key_values is None else list(past_key_values)
        past_length = pasts[0][0].shape[1] if pasts[0] is not None else 0
        given = attention_mask if attn_mask_startend_row_indices is None else attn_mask_startend_row_indices
        if position_ids is None:
            position_ids = paddle.arange(shape[1]).expand(shape)  # [batch, length]
        hidden = self._placed(hidden, position_ids)
        visible = self._visible(given, shape, past_length, hidden.dtype, position_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        hidden, cache = self._run_layers(self._enter(hidden), position_ids, visible, pasts, use_cache)
        hidden = self.norm(hidden)
        if return_dict if return_dict is not None else self.config.use_return_dict:
            return BaseModelOutputWithPastAndCrossAttentions(
                last_hidden_state=hidden, past_key_values=cache or None
            )
        return (hidden, cache) if use_cache else (hidden,)

    def _visible(
        self: Any, given: Any, shape: tuple[int, int], past_length: int, dtype: Any, position_ids: Any
    ) -> Any:
        """What the layers get as their mask."""
        if getattr(self.config, "alibi", False):
            return self._distances(given, shape, past_length, position_ids)
        if self.config.use_flash_attention:
            return visible_keys(given, shape, past_length)
        refuse_packed_rows(given)
        if given is None:
            given = paddle.ones([shape[0], past_length + shape[1]], dtype="bool")  # [batch, keys]
        return self._prepare_decoder_attention_mask(given, shape, past_length, dtype)

    def _distances(
        self: Any,
        given: Any,
        shape: tuple[int, int],
        past_length: int,
        position_ids: Any,
        *,
        rounded_divisor: float | None = None,
    ) -> Any:
        """The bias of this rank's heads, float32 [batch, heads, queries, keys]."""
        num_heads = self.config.num_attention_heads
        slopes = distance_slopes(num_heads)
        own = num_heads // max(self.config.tensor_parallel_degree, 1)
        first = own * max(self.config.tensor_parallel_rank, 0)
        return distances_and_mask(
            slopes[first : first + own],
            given,
            shape,
            past_length,
            position_ids=position_ids,
            rounded_divisor=rounded_divisor,
        )

    def _placed(self: Any, hidden: Any, _position_ids: Any) -> Any:
        """Word embeddings -> what the layers get, with positions where the family adds them."""
        return hidden

    def _enter(self: Any, hidden: Any) -> Any:
        """Word embeddings -> what the first layer gets."""
        if not self.config.sequence_parallel:
            return hidden
        return ScatterOp.apply(hidden.flatten(0, 1))  # [batch * length / ranks, hidden]

    def _seen_by(self: Any, _layer: Any, visible: Any) -> Any:
        """A layer's part of what `_visible` gave."""
        return visible

    def _run_layers(
        self: Any, hidden: Any, position_ids: Any, visible: Any, pasts: list[Any], use_cache: bool
    ) -> tuple[Any, tuple[Any, ...]]:
        cache: tuple[Any, ...] = ()
        for index, layer in enumerate(self.layers):
            past, pasts[index] = pasts[index], None  # not kept longer than needed
            arguments = (hidden, position_ids, self._seen_by(layer, visible), False, past, use_cache)
            recomputed = self.enable_recompute and self.recompute_granularity == "full"
            if recomputed and index not in self.no_recompute_layers and not hidden.stop_gradient:
                outputs = self.recompute_training_full(layer, *arguments)
            else:
                outputs = layer(*arguments)
            hidden = outputs[0] if isinstance(outputs, tuple) else outputs
            cache += (outputs[1],) if use_cache else ()
        return hidden, cache


def keep_rotary_tables(model: Any) -> None:
    """Float32 tables for all attention layers of a model, unless a fused kernel asks for those of its own type."""
    if model.config.use_fused_rope:
        return
    for layer in model.sublayers():
        if hasattr(layer, "rotary_emb"):
            keep_tables(layer.rotary_emb)


def attend_by_one_mask(modeling: Any) -> None:
    """Puts the attention of `finetune.families.attention` into a module of PaddleNLP's.

    Without a kernel and in float32 PaddleNLP's own function runs, but for the bias of distances, which it cannot take.

    Args:
        modeling: Has `scaled_dot_product_attention(query, config, key, value, mask, ...)`.
    """
    stock = modeling.scaled_dot_product_attention

    def scaled_dot_product_attention(
        query: Any,
        config: Any,
        key: Any,
        value: Any,
        mask: Any,
        output_attentions: bool,
        *rest: Any,
        **more: Any,
    ) -> Any:
        fused = config.use_flash_attention
        biased = mask is not None and mask.ndim == 4 and mask.shape[1] > 1
        if output_attentions or not (fused or biased or query.dtype in HALF_TYPES):
            return stock(query, config, key, value, mask, output_attentions, *rest, **more)
        rate = _drop_rate(config) if more.get("training", more.get("trainer_mode")) else 0.0
        if fused:
            output = fused_attention(query, key, value, mask, drop_rate=rate)
        else:
            output = plain_attention(query, key, value, mask, drop=_dropout(rate))
        return output.flatten(2).flatten(0, 1) if config.sequence_parallel else output.flatten(2)

    replace(modeling, "scaled_dot_product_attention", scaled_dot_product_attention)


def _drop_rate(config: Any) -> float:
    return float(getattr(config, "attention_dropout", None) or 0.0)


def _dropout(rate: float) -> Any:
    if not rate:
        return None
    # Looked up when called: dropout whose masks follow the samples takes the function's place.
    return lambda weights: paddle.nn.functional.dropout(weights, p=rate, training=True)
