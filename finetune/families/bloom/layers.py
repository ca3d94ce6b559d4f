"""BLOOM with distances that respect packed rows behind a prefix, and that half precision does not round away.

ALiBi adds slope x (position of the key) to every score; softmax ignores what all keys of a query share,
so only differences count (Press et al., "Train Short, Test Long", 2022). PaddleNLP takes the column as
the position of a key. Within one sample of a packed row that is exact, but between a sample and a prefix
in front of the whole row it is not: later samples see the prefix from farther away than alone. Here
`position_ids`, which start anew at each sample, place the keys.

PaddleNLP keeps the positions in the type of the run and adds them to scores of that type, so that in bfloat16 from
256 on neighbours are one. Here distance and mask are one float32 tensor, added to float32 scores; a fused kernel,
which wants it in the type of the run, gets differences of positions, small where they matter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import paddle
from paddle.distributed.fleet.utils import recompute
from paddlenlp.transformers.bloom import modeling
from paddlenlp.transformers.conversion_utils import StateDictNameMapping

from finetune.families.attention import (
    distances_and_mask,
    fused_attention,
    plain_attention,
)


class BloomAttention(modeling.BloomAttention):
    """Attention that adds one bias, distances and mask, to its scores."""

    def forward(
        self,
        hidden_states: Any,
        residual: Any,
        alibi: Any = None,
        attention_mask: Any = None,
        layer_past: Any = None,
        head_mask: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Any, Any]:
        """Output [batch, length, hidden] with the residual, and keys and values or None.

        Args:
            hidden_states: [batch, length, hidden].
            residual: Added to the output.
            alibi: Not used.
            attention_mask: The bias, float32 [batch, heads, length, keys].
            layer_past: Keys and values so far [batch, past, heads, head dim].
            head_mask: Not used.
            use_cache: Return keys and values.
            output_attentions: Not used.
        """
        query, key, value = self._split_heads(
            self.query_key_value(hidden_states)
        )  # [batch, length, heads, head dim] each
        if layer_past is not None:
            key = paddle.concat([layer_past[0], key], axis=1)  # [batch, past + length, heads, head dim]
            value = paddle.concat([layer_past[1], value], axis=1)
        if self.config.use_flash_attention:
            rate = self.config.attention_dropout if self.training else 0.0
            output = fused_attention(query, key, value, attention_mask, drop_rate=rate)
        else:
            output = plain_attention(query, key, value, attention_mask, drop=self.attention_dropout)
        output = modeling.dropout_add(
            self.dense(output.flatten(2)), residual, self.hidden_dropout, self.training
        )
        return output, (key, value) if use_cache else None


class BloomModel(modeling.BloomModel):
    """BLOOM's decoder with `position_ids`."""

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
            attention_mask: [batch, past + length] with 1 for tokens, or [batch, 1, length, past + length],
                true for what may be seen. None: all tokens.
            position_ids: [batch, length], used with a 4-D mask only.
            inputs_embeds: Word embeddings [batch, length, hidden] instead of `input_ids`.
            use_cache: Return keys and values.
            **unused: PaddleNLP's requests for all hidden states and attentions, which nothing here makes.
        """
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        shape = tuple(inputs_embeds.shape[:2])
        past_length = past_key_values[0][0].shape[1] if past_key_values is not None else 0
        hidden = self.word_embeddings_layernorm(inputs_embeds)  # [batch, length, hidden]
        bias = self._bias(attention_mask, position_ids, shape, past_length)  # [batch, heads, length, keys]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache: tuple[Any, ...] = ()
        for index, block in enumerate(self.h):
            past = past_key_values[index] if past_key_values is not None else None
            if self.enable_recompute and self.training:
                hidden = recompute(block, hidden, layer_past=past, attention_mask=bias, use_reentrant=False)[
                    0
                ]
                continue
            outputs = block(hidden, layer_past=past, attention_mask=bias, use_cache=use_cache)
            hidden = outputs[0]
            cache += (outputs[1],) if use_cache else ()
        hidden = self.ln_f(hidden)
        return (hidden, cache) if cache else (hidden,)

    def _bias(self, given: Any, position_ids: Any, shape: tuple[int, int], past_length: int) -> Any:
        """Distances and mask for the heads of this card, float32 [batch, heads, length, past + length]."""
        return distances_and_mask(self._slopes(), given, shape, past_length, position_ids=position_ids)

    def _slopes(self) -> paddle.Tensor:
        """[heads of this card]."""
        pair = paddle.ones([1, 2], dtype="bool")
        num_heads = self.config.n_head // max(self.config.tensor_parallel_degree, 1)
        first = max(self.config.tensor_parallel_rank, 0) * num_heads
        slopes = modeling.build_alibi_tensor(pair, self.config.n_head, paddle.float32)[0, :, 1]
        return slopes[first : first + num_heads]


class BloomForCausalLM(modeling.BloomForCausalLM):
    """BLOOM with its output layer, built on the decoder above."""

    def __init__(self, config: Any):
        super(modeling.BloomForCausalLM, self).__init__(config)
        self.bloom = BloomModel(config)
        for block in self.bloom.h:
            block.self_attention.__class__ = BloomAttention
        self.lm_head = modeling.BloomLMHead(config, self.bloom.word_embeddings.weight)
        self.criterion = modeling.BloomPretrainingCriterion(
            tensor_parallel_degree=config.tensor_parallel_degree,
            tensor_parallel_output=config.tensor_parallel_output,
        )

    @classmethod
    def _get_name_mappings(cls, config: Any) -> list[Any]:
        """PaddleNLP's table, the same names without "transformer." and a stored copy of the embedding.

        The published files have the short names.
        """
        mappings = super()._get_name_mappings(config)
        bare = [replace(each, source_name=each.source_name.removeprefix("transformer.")) for each in mappings]
        return [*mappings, *bare, StateDictNameMapping("lm_head.weight", "lm_head.decoder_weight")]
