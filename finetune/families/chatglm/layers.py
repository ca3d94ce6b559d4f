"""ChatGLM-6B: a decoder whose prompts are read in both directions, and whose heads are turned by two positions.

The architecture is GLM's (Du et al., "GLM: General Language Model Pretraining with Autoregressive Blank Infilling",
2022) in the sizes of ChatGLM-6B. A text is `context [gMASK] <sop> answer`. All that stands before <sop> is seen by
every token of the text. The first half of a head turns by the token's place in the context, which for <sop> and the
answer is that of [gMASK]; the second half by the place in the answer, 0 in the context and 1 for <sop>. Each branch is
added to sqrt(2 x layers) times what its norm gives. PaddleNLP's model takes one text in a row only.

Both positions and the mask follow from the ids, so that packed rows, rows that share a prompt, and stages of a pipeline
need nothing else: position 0 begins a text in a row. A text without <sop> is read from left to right, by its places.
"""

from __future__ import annotations

from typing import Any

import paddle

from finetune.families.attention import additive, causal_mask, refuse_packed_rows
from finetune.families.chatglm.config import stored_frequencies
from finetune.families.context_marks import ABSENT, ContextMarks
from finetune.families.head_attention import HeadAttention
from finetune.families.head_decoder import HeadConfig, HeadDecoder, HeadForCausalLM
from finetune.families.head_facts import HeadFacts
from finetune.families.rotary import turn
from finetune.families.rotary_tables import RotaryTables
from finetune.families.two_positions import answer_place, first_marks, positions_of, two_positions


class ChatGLMConfig(HeadConfig):
    """ChatGLM-6B's configuration.

    Args:
        gmask_token_id: Of [gMASK], behind which a whole answer stands.
        mask_token_id: Of [MASK], behind which a part of a text stands.
        position_encoding_2d: Always true.
        total_layers: Layers of the whole model; None: `num_hidden_layers`.
        tie_word_embeddings: Always true.
        **fields: As `HeadConfig` has them.
    """

    model_type = "chatglm"

    def __init__(
        self,
        gmask_token_id: int = 130001,
        mask_token_id: int = 130000,
        position_encoding_2d: bool = True,
        total_layers: int | None = None,
        tie_word_embeddings: bool = True,
        **fields: Any,
    ):
        super().__init__(tie_word_embeddings=tie_word_embeddings, **fields)
        self.gmask_token_id, self.mask_token_id = gmask_token_id, mask_token_id
        self.position_encoding_2d = position_encoding_2d
        self.total_layers = total_layers or self.num_hidden_layers

    @property
    def context_marks(self) -> ContextMarks:
        """The tokens that divide a text."""
        return ContextMarks(self.bos_token_id, self.gmask_token_id, self.mask_token_id)


class TwoPositionTables(RotaryTables):
    """Cosine and sine of two positions of each token."""

    def _work_out(self, position_ids: Any) -> tuple[Any, Any]:
        """Cosine and sine [batch, length, 1, 2, turned] at positions [batch, 2, length].

        They are made in this order of axes: recomputation keeps the memory of a tensor, but not how it was turned.
        """
        batch, _, length = position_ids.shape
        tokens = position_ids.transpose([0, 2, 1]).flatten(0, 1)  # [batch * length, 2]
        cos, sin = super()._work_out(tokens)  # [batch * length, 2, 1, turned]
        return cos.reshape([batch, length, 1, 2, -1]), sin.reshape([batch, length, 1, 2, -1])


class TwoPositionAttention(HeadAttention):
    """Attention whose heads turn by two positions, a half by each."""

    def _turned(self, heads: Any, cos: Any, sin: Any) -> Any:
        parts = heads.reshape(
            [*heads.shape[:3], 2, self.head_dim // 2]
        )  # [batch, length, heads, 2, head dim / 2]
        return turn(parts, cos, sin).reshape(heads.shape)


class ChatGLMModel(HeadDecoder):
    """The decoder."""

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, attention_mask: Any = None, **more: Any
    ) -> Any:
        """As `GatedDecoder.forward`.

        Args:
            input_ids: [batch, length].
            position_ids: [batch, length], place of each token in its own text; or both positions [batch, 2, length],
                as `prepare_inputs_for_generation` makes them.
            attention_mask: [batch, keys] with 1 for tokens, or [batch, 1, queries, keys], true for what is seen.
            **more: The rest of the decoder's arguments.
        """
        refuse_packed_rows(attention_mask)
        shape = tuple(input_ids.shape)
        past = more.get("past_key_values")
        past_length = past[0][0].shape[1] if past is not None and past[0] is not None else 0
        if position_ids is None:
            position_ids = paddle.arange(shape[1]).expand(shape)
        visible = causal_mask(attention_mask, shape, past_length)  # [batch, 1, length, past + length]
        if position_ids.ndim == 2:
            texts = TextPlaces(input_ids, position_ids, self.config)
            visible = _with_contexts(visible, texts.sees_context(), attention_mask, past_length)
            position_ids = texts.two_positions()
        elif shape[1] > 1:
            raise ValueError("both positions are given for single tokens only")
        return super().forward(input_ids, position_ids, visible, **more)

    def _visible(
        self, given: Any, shape: tuple[int, int], past_length: int, dtype: Any, position_ids: Any
    ) -> dict[bool, Any]:
        return {False: given if self.config.use_flash_attention else additive(given, paddle.float32)}


def _with_contexts(visible: Any, sees: Any, given: Any, past_length: int) -> Any:
    """A mask that shows each token its own text's context, too."""
    if given is not None and given.ndim == 2:  # padding within a text, where no positions were given
        sees = sees & given[:, past_length:].astype("bool").unsqueeze([1, 2])
    if past_length:
        unseen = paddle.zeros([*sees.shape[:3], past_length], dtype="bool")
        sees = paddle.concat([unseen, sees], axis=-1)
    return visible | sees


class TextPlaces:
    """Where the texts of rows have their marks.

    Args:
        input_ids: [batch, length].
        position_ids: [batch, length], place of each token in its own text.
        config: Knows the ids of the marks.
    """

    def __init__(self, input_ids: Any, position_ids: Any, config: Any):
        self.places = position_ids.astype("int64")
        numbers = (self.places == 0).astype("int64").cumsum(axis=1)
        self.is_same = numbers.unsqueeze(2) == numbers.unsqueeze(1)  # [batch, length, length]
        self.start = self._first(input_ids == config.bos_token_id)  # [batch, length], of <sop>
        whole, part = (
            self._first(input_ids == index) for index in (config.gmask_token_id, config.mask_token_id)
        )
        self.answer = answer_place(self.start, whole, part)

    def _first(self, is_mark: Any) -> Any:
        """Place of the first such token in each token's text; `ABSENT` where there is none."""
        places = paddle.where(is_mark, self.places, paddle.full_like(self.places, ABSENT)).unsqueeze(1)
        return paddle.where(self.is_same, places, paddle.full_like(places, ABSENT)).min(axis=2)

    def sees_context(self) -> Any:
        """Bool [batch, 1, queries, keys], whether the key is in the context of the query's text."""
        is_context = (self.places < self.start) & (self.start < ABSENT)
        return (self.is_same & is_context.unsqueeze(1)).unsqueeze(1)

    def two_positions(self) -> Any:
        """int64 [batch, 2, length]."""
        return paddle.stack([*two_positions(self.places, self.start, self.answer)], axis=1)


class ChatGLMForCausalLM(HeadForCausalLM):
    """ChatGLM-6B with its output layer, which is the embedding."""

    config_class = ChatGLMConfig
    base_model_prefix = "chatglm"

    def __init__(self, config: Any):
        super().__init__(config)
        decoder = self.qwen2
        decoder.__class__ = ChatGLMModel
        half = config.head_dim // 2
        tables = TwoPositionTables(stored_frequencies(config.rope_theta, half), halves=True)
        for layer in decoder.layers:
            layer.self_attn.__class__ = TwoPositionAttention
            layer.self_attn.tables = tables

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Of the one model that there is."""
        return HeadFacts(
            joined_input=True,
            grouped_input=True,
            input_bias=True,
            output_bias=True,
            inner_bias=True,
            gated=False,
            activation="gelu_tanh",
            centred_norms=True,
            norm_factor=(2 * config.total_layers) ** 0.5,
        )

    def follow_texts(
        self,
        input_ids: Any,
        position_ids: Any,
        attention_mask: Any = None,
        context_marks: Any = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """What later steps of generation have to know of tokens that they do not get again, one row for each text.

        Args:
            input_ids: The tokens of this step [batch, length].
            position_ids: Their places [batch, length].
            attention_mask: [batch, tokens so far], 0 for padding; None: there is none.
            context_marks: What the step before gave; None in the first.
            **unused: The rest of the state of generation.

        Returns:
            `context_marks`, int64 [batch, 3]: where the texts have their marks.
        """
        length = input_ids.shape[1]
        real = None if attention_mask is None else attention_mask[:, -length:].astype("bool")
        places = position_ids.astype("int64")
        ids = self.config.context_marks.ids
        return {"context_marks": first_marks(input_ids, places, ids, before=context_marks, real=real)}

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        position_ids: Any = None,
        past_key_values: Any = None,
        context_marks: Any = None,
        **more: Any,
    ) -> dict[str, Any]:
        """What a step of generation gives the model: the whole text first, then its last token with both positions.

        Args:
            input_ids: All tokens so far [batch, length]; with `context_marks` the last is enough.
            position_ids: Their places [batch, length].
            past_key_values: Keys and values of all but the last; None in the first step.
            context_marks: What `follow_texts` gave; None: found in `input_ids`.
            **more: `attention_mask` [batch, length] and `use_cache`.
        """
        if position_ids is None:
            position_ids = paddle.arange(input_ids.shape[1]).expand(input_ids.shape)
        if past_key_values is not None:
            if context_marks is None:
                context_marks = self.follow_texts(input_ids, position_ids, **more)["context_marks"]
            input_ids, places = input_ids[:, -1:], position_ids[:, -1:].astype("int64")
            position_ids = paddle.stack([*positions_of(places, context_marks)], axis=1)  # [batch, 2, 1]
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": more.get("use_cache", False),
            "attention_mask": more.get("attention_mask"),
        }
