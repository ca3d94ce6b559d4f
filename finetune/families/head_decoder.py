"""A gated decoder around `HeadAttention`: PaddleNLP's Qwen2 in everything but its attention.

A family derives from `HeadConfig` and `HeadForCausalLM`, names itself and states its `HeadFacts`; embeddings, norms,
feed-forward layers, recomputation, generation and the output layer are PaddleNLP's.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, ClassVar

from paddle import nn
from paddle.distributed.fleet.layers.mpu.mp_layers import VocabParallelEmbedding
from paddle.distributed.fleet.utils import recompute
from paddle.distributed.fleet.utils.sequence_parallel_utils import mark_as_sequence_parallel_parameter
from paddlenlp.transformers import Qwen2Config
from paddlenlp.transformers.conversion_utils import StateDictNameMapping
from paddlenlp.transformers.qwen2 import modeling

from finetune.families.attention import visible_in_window
from finetune.families.experts import ExpertFeedForward
from finetune.families.family import get_family
from finetune.families.gated_layers import GatedDecoder
from finetune.families.head_attention import HeadAttention
from finetune.families.head_facts import HeadFacts, RotaryAngles
from finetune.families.head_layers import (
    CappedHead,
    DividedHead,
    FeedForward,
    GatedFeedForward,
    NormedHead,
    OffsetNorm,
)
from finetune.families.rotary_tables import RotaryTables


class HeadConfig(Qwen2Config):
    """Configuration of a decoder whose heads have a size of their own.

    Args:
        head_dim: Size of a head; None: hidden size / heads.
        rope_scaling: Stretched rotary positions; see `finetune.families.rotary_config`.
        text_positions: Most tokens of a text; None: `max_position_embeddings`.
        num_key_value_heads: None: as many as heads.
        **fields: As PaddleNLP's Qwen2 has them.
    """

    def __init__(
        self,
        head_dim: int | None = None,
        rope_scaling: dict[str, Any] | None = None,
        text_positions: int | None = None,
        num_key_value_heads: int | None = None,
        **fields: Any,
    ):
        super().__init__(num_key_value_heads=num_key_value_heads, **fields)
        self.rope_scaling = rope_scaling
        self.text_positions = text_positions
        self.head_dim = head_dim or self.hidden_size // self.num_attention_heads


class HeadDecoderLayer(nn.Layer):
    """Attention and feed-forward layer of one depth.

    Args:
        config: Sizes and degrees of parallelism.
        facts: Of the decoder.
        tables: Rotary positions, shared by all layers that turn by the same angles; None: this one does not turn.
        number: Of the layer in the whole model.
        layerwise_recompute: Whether this layer may be computed again in the backward pass.
    """

    def __init__(
        self,
        config: Any,
        facts: HeadFacts,
        tables: RotaryTables | None,
        *,
        number: int,
        layerwise_recompute: bool,
    ):
        super().__init__()
        self.config, self.names, self.has_window = config, facts.norms, facts.has_window(number)
        self.parallel_branches, self.norm_factor = facts.parallel_branches, facts.norm_factor
        self.branch_scale = facts.branch_scale
        self.skip_recompute_ops: dict[str, bool] = {}  # PaddleNLP asks for it where it repeats a layer
        self.self_attn = HeadAttention(config, facts, tables, layerwise_recompute=layerwise_recompute)
        self.mlp = _feed_forward(config, facts, number)
        for name in facts.norms.all:
            self.add_sublayer(name, hidden_norm(config, facts))
        # Set from outside where recomputation is wanted.
        self.enable_recompute, self.layerwise_recompute = False, layerwise_recompute

    def forward(
        self,
        hidden: Any,
        position_ids: Any = None,
        attention_mask: Any = None,
        output_attentions: bool = False,
        past_key_value: Any = None,
        use_cache: bool = False,
        *unused: Any,
    ) -> Any:
        """Output like `hidden`; with `use_cache` a pair of it and (keys, values).

        Args:
            hidden: [batch, length, hidden]; under sequence parallelism [batch * length / ranks, hidden].
            position_ids: [batch, length].
            attention_mask: See `finetune.families.attention`.
            output_attentions: PaddleNLP's request for probabilities, which nothing here makes.
            past_key_value: Keys and values [batch, past, kv heads, head dim].
            use_cache: Return keys and values.
            *unused: What PaddleNLP hands on besides.
        """
        names, config = self.names, self.config
        normed = self._normed(names.attention, hidden)
        arguments = (normed, position_ids, past_key_value, attention_mask, output_attentions, use_cache)
        repeated = self.enable_recompute and self.layerwise_recompute and not normed.stop_gradient
        if repeated and config.recompute_granularity == "full_attn":
            attended = recompute(self.self_attn, *arguments, use_reentrant=config.recompute_use_reentrant)
        else:
            attended = self.self_attn(*arguments)
        attended, cache = attended if use_cache else (attended, None)
        attended = self._branch(names.attention_output, attended)
        if self.parallel_branches:
            inner = self.mlp(normed if names.inner is None else self._normed(names.inner, hidden))
            hidden = hidden + (attended + self._branch(names.inner_output, inner))
        else:
            hidden = self._kept(hidden, normed) + attended
            normed = self._normed(names.inner, hidden)
            hidden = self._kept(hidden, normed) + self._branch(names.inner_output, self.mlp(normed))
        return (hidden, cache) if use_cache else hidden

    def _kept(self, hidden: Any, normed: Any) -> Any:
        return hidden if self.norm_factor is None else normed * self.norm_factor

    def _branch(self, norm: str | None, output: Any) -> Any:
        """What a branch gives, as it is added."""
        branch = self._normed(norm, dropped(output, getattr(self.config, "branch_dropout", 0.0), self))
        return branch if self.branch_scale == 1.0 else branch * self.branch_scale

    def _normed(self, name: str | None, hidden: Any) -> Any:
        return hidden if name is None else self._sub_layers[name](hidden)


class HeadDecoder(GatedDecoder, modeling.Qwen2Model):
    """The decoder without its output layer.

    Args:
        config: Sizes. `own_layers`: numbers of the layers to build, where a stage of a pipeline holds some of them.
        facts: What tells this decoder from others.
    """

    def __init__(self, config: Any, facts: HeadFacts):
        super(modeling.Qwen2Model, self).__init__(config)
        self.facts = facts
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.hidden_size, self.sequence_parallel = config.hidden_size, config.sequence_parallel
        self.recompute_granularity = config.recompute_granularity
        self.no_recompute_layers = config.no_recompute_layers or []
        self.enable_recompute = False
        degree = config.tensor_parallel_degree
        is_split = degree > 1 and config.vocab_size % degree == 0
        embedding = VocabParallelEmbedding if is_split else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        numbers = getattr(config, "own_layers", None) or range(config.num_hidden_layers)
        tables = _tables(config, facts)
        self.layers = nn.LayerList(
            HeadDecoderLayer(
                config,
                facts,
                tables[facts.has_window(number)] if facts.has_turn(number) else None,
                number=number,
                layerwise_recompute=index not in self.no_recompute_layers,
            )
            for index, number in enumerate(numbers)
        )
        self.norm = hidden_norm(config, facts)
        if facts.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def _placed(self, hidden: Any, position_ids: Any) -> Any:
        if not self.facts.learned_positions or getattr(self.embed_positions, "is_placeholder", False):
            return hidden  # in a later stage of a pipeline it comes from the one before
        placed = hidden + self.embed_positions(position_ids)
        return dropped(placed, getattr(self.config, "embedding_dropout", 0.0), self)

    def _visible(
        self, given: Any, shape: tuple[int, int], past_length: int, dtype: Any, position_ids: Any
    ) -> dict[bool, Any]:
        """What layers without and with a window get as their mask."""
        if self.facts.distances:
            divisor = self.facts.rounded_divisor
            return {False: self._distances(given, shape, past_length, position_ids, rounded_divisor=divisor)}
        # Masks of several texts in a row are met in training only, where nothing but a prefix is past.
        places = position_ids + past_length
        return {
            narrow: visible_in_window(
                given,
                shape,
                past_length,
                places=places,
                window=self.facts.window if narrow else None,
                fused=self.config.use_flash_attention,
            )
            for narrow in {layer.has_window for layer in self.layers}
        }

    def _seen_by(self, layer: Any, visible: Any) -> Any:
        return visible[layer.has_window]

    def _enter(self, hidden: Any) -> Any:
        entered = super()._enter(hidden)
        return entered if self.facts.embedding_scale == 1.0 else entered * self.facts.embedding_scale


def dropped(x: Any, rate: float, layer: Any) -> Any:
    """Dropout while a layer is trained."""
    # Looked up when called: dropout whose masks follow the samples takes the function's place.
    return nn.functional.dropout(x, p=rate, training=True) if rate and layer.training else x


def hidden_norm(config: Any, facts: HeadFacts) -> Any:
    """A norm of hidden states: RMS, or one that takes the mean off."""
    if facts.centred_norms:
        norm = nn.LayerNorm(config.hidden_size, epsilon=config.rms_norm_eps)
        for parameter in norm.parameters() if config.sequence_parallel else ():
            mark_as_sequence_parallel_parameter(parameter)  # a rank has the gradient of its rows only
        return norm
    return OffsetNorm(config) if facts.norm_offset else modeling.Qwen2RMSNorm(config)


def _tables(config: Any, facts: HeadFacts) -> dict[bool, RotaryTables]:
    """Rotary positions of layers without and with a window."""
    angles = RotaryAngles.of(facts, base=config.rope_theta, head_dim=config.head_dim)
    whole = RotaryTables(angles.frequencies, halves=facts.halves, amplitude=angles.amplitude)
    if angles.local is None:
        return {False: whole, True: whole}
    return {False: whole, True: RotaryTables(angles.local, halves=facts.halves)}


class HeadForCausalLM(modeling.Qwen2ForCausalLM):
    """The decoder with its output layer.

    `base_model_prefix` names the decoder in the names of parameters, and the family. A family whose facts depend on its config.json
    overrides `facts_of`.
    """

    config_class: ClassVar[Any] = HeadConfig
    facts: ClassVar[HeadFacts] = HeadFacts()

    def __init__(self, config: Any):
        super(modeling.Qwen2ForCausalLM, self).__init__(config)
        # Of this model, under the name by which those of the class are known.
        self.facts = self.facts_of(config)  # type: ignore[misc]
        decoder = HeadDecoder(config, self.facts)
        self.add_sublayer(self.base_model_prefix, decoder)
        tied = bool(config.tie_word_embeddings)
        shared = decoder.embed_tokens.weight if tied else None
        head: Any = modeling.Qwen2LMHead
        if self.facts.logit_cap is not None:
            head = functools.partial(CappedHead, cap=self.facts.logit_cap)
        if self.facts.logit_divisor != 1.0:
            head = functools.partial(DividedHead, divisor=self.facts.logit_divisor)
        if self.facts.normed_head:
            head = NormedHead
        self.lm_head = head(config, embedding_weights=shared, transpose_y=tied)
        if tied:
            self.tie_weights()
        self.criterion = modeling.Qwen2PretrainingCriterion(config)
        self.vocab_size = config.vocab_size

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """The facts of a model with this configuration."""
        return cls.facts

    @property
    def qwen2(self) -> Any:
        """The decoder, under the name by which PaddleNLP's methods know it."""
        return self._sub_layers[self.base_model_prefix]

    @classmethod
    def _get_name_mappings(cls, config: Any) -> list[Any]:
        """Hugging Face's names of all tensors, and PaddleNLP's."""
        facts = cls.facts_of(config)
        names = ["embed_tokens.weight", "norm.weight"]
        names += ["embed_positions.weight"] if facts.learned_positions else []
        names += ["norm.bias"] if facts.centred_norms else []
        for number in range(config.num_hidden_layers):
            names += [f"layers.{number}.{name}" for name in _layer_tensors(facts, number)]
        prefix = cls.base_model_prefix
        form = get_family(prefix).hugging_face
        ours = [f"{prefix}.{name}" for name in names]
        ours += [] if config.tie_word_embeddings else ["lm_head.weight"]
        table = [_mapping(form.published_name(name, prefix), name, turned=form.turned) for name in ours]
        if not form.bare:
            return table
        first = f"{form.prefix}."
        return [*table, *(replace(each, source_name=each.source_name.removeprefix(first)) for each in table)]

    @classmethod
    def _get_fuse_or_split_param_mappings(cls, config: Any, is_fuse: bool = False) -> dict[Any, Any]:
        """PaddleNLP's functions that join and take apart layers, for the biases of feed-forward layers, too."""
        actions: dict[Any, Any] = super()._get_fuse_or_split_param_mappings(config, is_fuse=is_fuse)
        inner = {names: action for names, action in actions.items() if "gate_up_fused_proj" in names[-1]}
        for names, action in inner.items():
            actions[tuple(name.replace(".weight", ".bias") for name in names)] = action
        return actions


def _feed_forward(config: Any, facts: HeadFacts, number: int) -> nn.Layer:
    if facts.has_experts(number):
        return ExpertFeedForward(config, facts)
    return GatedFeedForward(config, facts) if facts.gated else FeedForward(config, facts)


def _layer_tensors(facts: HeadFacts, number: int) -> list[str]:
    """Tensors of a layer as the files have them, by PaddleNLP's names."""
    inputs = ["query_key_value_proj"] if facts.joined_input else ["q_proj", "k_proj", "v_proj"]
    inner = (
        ["gate_up_proj"] if facts.joined_inner else ["gate_proj", "up_proj"] if facts.gated else ["up_proj"]
    )
    layers = [f"self_attn.{name}" for name in (*inputs, "o_proj")]
    layers += [f"self_attn.{name}" for name in ("q_norm", "k_norm") if facts.normed]
    sparse = facts.experts if facts.has_experts(number) else None
    inner = [*inner, "down_proj"] if sparse is None else [*sparse.linear_layers()]
    layers += [f"mlp.{name}" for name in inner]
    biased = [f"self_attn.{name}" for name in inputs if facts.input_bias]
    biased += ["self_attn.o_proj"] if facts.output_bias else []
    biased += [f"mlp.{name}" for name in inner if facts.inner_bias]
    layers += facts.norms.all
    biased += facts.norms.all if facts.centred_norms else []
    return [*(f"{name}.weight" for name in layers), *(f"{name}.bias" for name in biased)]


def _mapping(theirs: str, ours: str, *, turned: bool) -> Any:
    """Matrices of the output layer and of routers, and mostly of linear layers, are stored as [out, in] there."""
    is_matrix = ours.endswith(("lm_head.weight", "gate.weight")) or (turned and ours.endswith("_proj.weight"))
    return StateDictNameMapping(theirs, ours, "transpose" if is_matrix else None)
