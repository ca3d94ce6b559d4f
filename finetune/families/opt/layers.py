"""OPT as published, in front of PaddleNLP's.

What PaddleNLP's `OPTForCausalLM` does otherwise, and what is right here:

- its output layer is a matrix of its own, which no Hugging Face checkpoint holds, so it stays random
  (logits off by their own size); here it is the input embedding, unless the files hold another;
- weights of the two projections around narrow embeddings (opt-350m) have no entry in its name table;
- it takes no `position_ids`, and a 4-D mask fails; packed rows need both;
- a prefix of trained keys and values fails, and recomputation is ignored silently;
- `use_flash_attention` is ignored silently, and scores are added and normalised in the type of the run;
- dropout is applied to the embeddings, which the published training does not do.

Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (2022).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed.fleet.utils import recompute
from paddlenlp.transformers.conversion_utils import StateDictNameMapping
from paddlenlp.transformers.llama.modeling import parallel_matmul
from paddlenlp.transformers.model_outputs import BaseModelOutputWithPastAndCrossAttentions
from paddlenlp.transformers.opt import modeling

from finetune.errors import UserError
from finetune.families.attention import (
    additive,
    dense_mask,
    fused_attention,
    plain_attention,
    refuse_packed_rows,
    visible_keys,
)

# fairseq reserved the first rows of the position table for padding.
POSITION_OFFSET = 2


class PrefixCache(modeling.MultiHeadAttention.Cache):
    """Keys and values of a trained prefix, which take no positions: the first token stays position 0.

    A prefix that took positions would shorten the longest text by its length.
    """


def prefix_cache(prefix: paddle.Tensor) -> list[PrefixCache]:
    """(batch, prefix length, 2 x layers, heads, head dim) -> per layer k and v (batch, heads, length, dim)."""
    keys, values = paddle.transpose(prefix, [2, 0, 3, 1, 4]).split(2)
    return [PrefixCache(key, value) for key, value in zip(keys, values, strict=True)]


def token_positions(attention_mask: paddle.Tensor) -> paddle.Tensor:
    """Positions [batch, length] that count the tokens of a 2-D mask from 0; 0 in the padding."""
    return (attention_mask.astype("int64").cumsum(axis=-1) - 1).clip(min=0)


class Attention(modeling.MultiHeadAttention):
    """Attention whose mask has any of the forms of `finetune.families.attention`."""

    use_flash_attention = False

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        use_cache: bool = False,
        cache: Any = None,
    ) -> tuple[Any, ...]:
        """Output [batch, length, hidden], None and, with `use_cache`, keys and values [batch, heads, keys, dim]."""
        prepare = (
            self._fuse_prepare_qkv
            if self.fuse_attention_qkv
            else partial(self._prepare_qkv, key=key, value=value)
        )
        query, key, value, cache = prepare(query, use_cache=use_cache, cache=cache)
        # [batch, ., heads, head dim]
        query, key, value = (part.transpose([0, 2, 1, 3]) for part in (query, key, value))
        drops = self.training and self.dropout
        if self.use_flash_attention:
            output = fused_attention(query, key, value, attn_mask, drop_rate=self.dropout if drops else 0.0)
        else:
            output = plain_attention(query, key, value, attn_mask, drop=self._drop if drops else None)
        output = self.out_proj(output.flatten(2))  # [batch, length, hidden]
        return (output, None, cache) if use_cache else (output, None)

    def _drop(self, weights: Any) -> Any:
        return F.dropout(weights, self.dropout, training=True)


class OPTModel(modeling.OPTModel):
    """OPT's decoder with explicit positions, block masks, prefixes and recomputation."""

    def __init__(self, config: Any):
        super().__init__(config)
        # The name under which the trainer switches recomputation on.
        self.enable_recompute = False
        for layer in self.decoder.layers:
            layer.self_attn.__class__ = Attention
            layer.self_attn.use_flash_attention = config.use_flash_attention

    def forward(
        self,
        input_ids: Any = None,
        position_ids: Any = None,
        attention_mask: Any = None,
        *,
        inputs_embeds: Any = None,
        use_cache: bool = False,
        cache: Any = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """Hidden states, and the cache when asked for.

        Args:
            input_ids: [batch, length].
            position_ids: [batch, length]; counted from the mask when not given.
            attention_mask: See `finetune.families.attention.visible_keys`. None: all tokens.
            inputs_embeds: Word embeddings [batch, length, embedding] instead of `input_ids`.
            use_cache: Return keys and values of every layer.
            cache: Keys and values so far, one entry per layer.
            return_dict: Return PaddleNLP's output object instead of a tuple or tensor.
            **unused: PaddleNLP's requests for all hidden states and attentions, which nothing here makes.
        """
        if inputs_embeds is None:
            inputs_embeds = self.embeddings.word_embeddings(input_ids)  # [batch, length, embedding]
        batch_size, length = inputs_embeds.shape[:2]
        past_length = cache[0].k.shape[2] if cache is not None else 0
        if position_ids is None:
            first = 0 if cache is None or isinstance(cache[0], PrefixCache) else past_length
            self._check_length(first + length)
            position_ids = _positions(attention_mask, [batch_size, length], past_length, first)
        hidden = self._embed(inputs_embeds, position_ids)  # [batch, length, hidden]
        mask = self._visible(attention_mask, (batch_size, length), past_length)
        hidden, new_cache = self._decode(hidden, mask, cache, use_cache)
        if return_dict if return_dict is not None else self.config.use_return_dict:
            return BaseModelOutputWithPastAndCrossAttentions(
                last_hidden_state=hidden, past_key_values=new_cache
            )
        return (hidden, new_cache) if use_cache else hidden

    def _visible(self, given: Any, shape: tuple[int, int], past_length: int) -> Any:
        """What the layers get as their mask."""
        if self.config.use_flash_attention:
            return visible_keys(given, shape, past_length)
        refuse_packed_rows(given)
        return additive(dense_mask(given, shape, past_length), paddle.float32)  # added to float32 scores

    def _check_length(self, length: int) -> None:
        """Raises UserError for a text that the position table has no rows for."""
        limit = self.config.max_position_embeddings
        if length > limit:
            raise UserError(
                f"a text has {length} tokens but this model has only {limit} positions: "
                f"set max_length (and src_length + max_new_tokens) to {limit} or less"
            )

    def _embed(self, inputs_embeds: paddle.Tensor, position_ids: paddle.Tensor) -> paddle.Tensor:
        embeddings = self.embeddings
        if getattr(embeddings.position_embeddings, "is_placeholder", False):  # a later stage of a pipeline
            return inputs_embeds
        if embeddings.project_in is not None:
            inputs_embeds = embeddings.project_in(inputs_embeds)  # [batch, length, hidden]
        table = embeddings.position_embeddings.weight  # [positions + offset, hidden]
        return inputs_embeds + F.embedding(position_ids + POSITION_OFFSET, table)

    def _decode(self, hidden: Any, mask: Any, cache: Any, use_cache: bool) -> tuple[Any, list[Any] | None]:
        new_cache: list[Any] | None = [] if use_cache else None
        for index, layer in enumerate(self.decoder.layers):
            past = cache[index] if cache is not None else None
            if self.enable_recompute and self.training and new_cache is None:
                hidden = recompute(layer, hidden, None, mask, False, past, use_reentrant=False)
                continue
            outputs = layer(hidden, None, tgt_mask=mask, use_cache=use_cache, cache=past)
            if new_cache is None:
                hidden = outputs
            else:
                hidden = outputs[0]
                new_cache.append(outputs[-1])
        if self.decoder.final_layer_norm is not None:
            hidden = self.decoder.final_layer_norm(hidden)
        if self.decoder.project_out is not None:
            hidden = self.decoder.project_out(hidden)  # [batch, length, embedding]
        return hidden, new_cache


class OutputLayer(nn.Layer):
    """Projects onto the vocabulary with a matrix [vocabulary, embedding]: the input embedding, or one of its shape."""

    def __init__(self, config: Any, embedding_weight: paddle.Tensor):
        super().__init__()
        self.config = config
        self.decoder_weight = embedding_weight
        if not config.tie_word_embeddings:
            self.decoder_weight = self.create_parameter(embedding_weight.shape, dtype=embedding_weight.dtype)
            self.decoder_weight.is_distributed = embedding_weight.is_distributed
            if embedding_weight.is_distributed:
                self.decoder_weight.split_axis = 0

    def forward(self, hidden: Any) -> paddle.Tensor:
        """[..., embedding] -> [..., vocabulary]."""
        return parallel_matmul(
            hidden,
            self.decoder_weight,
            transpose_y=True,
            tensor_parallel_output=self.config.tensor_parallel_output,
        )


class OPTForCausalLM(modeling.OPTForCausalLM):
    """OPT with the output layer tied to its embedding, as published, or untied with `tie_word_embeddings` false."""

    _tied_weights_keys = ["lm_head.decoder_weight"]
    _keys_to_ignore_on_load_missing = [r"lm_head\.decoder_weight"]

    def __init__(self, config: Any):
        super(modeling.OPTForCausalLM, self).__init__(config)
        self.opt = OPTModel(config)
        self.lm_head = OutputLayer(config, self.opt.embeddings.word_embeddings.weight)
        if not config.tie_word_embeddings:
            self._tied_weights_keys = []
            self._keys_to_ignore_on_load_missing = []

    def __getattr__(self, name: str) -> Any:
        """As for any layer: PaddleNLP's answers None to names that neither model nor config has."""
        return super(modeling.OPTForCausalLM, self).__getattr__(name)

    def forward(
        self,
        input_ids: Any = None,
        position_ids: Any = None,
        attention_mask: Any = None,
        cache: Any = None,
        *,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        attn_mask_startend_row_indices: Any = None,
        **unused: Any,
    ) -> Any:
        """Logits [batch, length, vocabulary], or (logits, cache) with `use_cache`; see `OPTModel.forward`."""
        if attn_mask_startend_row_indices is not None:
            attention_mask = attn_mask_startend_row_indices
        outputs = self.opt(
            input_ids,
            position_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            cache=cache,
            return_dict=False,
        )
        if isinstance(outputs, tuple):
            return self.lm_head(outputs[0]), outputs[1]
        return self.lm_head(outputs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        use_cache: bool = False,
        cache: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """Inputs of one decoding step; positions follow the mask where none were given."""
        if position_ids is None:
            mask = paddle.ones_like(input_ids) if attention_mask is None else attention_mask
            position_ids = token_positions(mask)
        if cache is not None:
            input_ids, position_ids = input_ids[:, -1:], position_ids[:, -1:]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "cache": cache,
            "use_cache": True,
        }

    @classmethod
    def _get_name_mappings(cls, config: Any) -> list[Any]:
        """PaddleNLP's table, with what published files hold besides.

        These are the projections around narrow embeddings, the copy of the embedding as output layer,
        and the names without "model." in the files of the first release.
        """
        mappings = super()._get_name_mappings(config)
        if config.word_embed_proj_dim != config.hidden_size:
            for source, target in (
                ("model.decoder.project_in.weight", "opt.embeddings.project_in.weight"),
                ("model.decoder.project_out.weight", "opt.decoder.project_out.weight"),
            ):
                mappings.append(StateDictNameMapping(source, target, "transpose"))
        bare = [replace(each, source_name=each.source_name.removeprefix("model.")) for each in mappings]
        return [*mappings, *bare, StateDictNameMapping("lm_head.weight", "lm_head.decoder_weight")]


def _positions(attention_mask: Any, shape: list[int], past_length: int, first: int) -> paddle.Tensor:
    """Positions [batch, length] of the new tokens, the first of them `first` unless padding precedes it."""
    if attention_mask is None or attention_mask.ndim != 2:
        return paddle.arange(first, first + shape[1]).expand(shape)
    if first:
        return token_positions(attention_mask)[:, past_length:]
    return token_positions(attention_mask[:, past_length:])
