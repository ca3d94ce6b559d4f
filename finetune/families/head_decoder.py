"""A gated decoder around `HeadAttention`: PaddleNLP's Qwen2 in everything but its attention.

A family derives from `HeadConfig` and `HeadForCausalLM`, names itself and states its `HeadFacts`; embeddings, norms,
feed-forward layers, recomputation, generation and the output layer are PaddleNLP's.
"""

from __future__ import annotations

from typing import Any, ClassVar

from paddle import nn
from paddle.distributed.fleet.layers.mpu.mp_layers import VocabParallelEmbedding
from paddlenlp.transformers import Qwen2Config
from paddlenlp.transformers.conversion_utils import StateDictNameMapping
from paddlenlp.transformers.qwen2 import modeling

from finetune.families.attention import visible_in_window
from finetune.families.gated_layers import GatedDecoder
from finetune.families.head_attention import HeadAttention, HeadFacts, RotaryTables
from finetune.families.head_layers import GatedFeedForward


class HeadConfig(Qwen2Config):
    """Configuration of a decoder whose heads have a size of their own.

    Args:
        head_dim: Size of a head; None: hidden size / heads.
        num_key_value_heads: None: as many as heads.
        **fields: As PaddleNLP's Qwen2 has them.
    """

    def __init__(self, head_dim: int | None = None, num_key_value_heads: int | None = None, **fields: Any):
        super().__init__(num_key_value_heads=num_key_value_heads, **fields)
        self.head_dim = head_dim or self.hidden_size // self.num_attention_heads


class HeadDecoderLayer(modeling.Qwen2DecoderLayer):
    """Attention and feed-forward layer of one depth."""

    def __init__(self, config: Any, facts: HeadFacts, tables: RotaryTables, *, layerwise_recompute: bool):
        super(modeling.Qwen2DecoderLayer, self).__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self.skip_recompute_ops: dict[str, bool] = {}
        self.self_attn = HeadAttention(config, facts, tables, layerwise_recompute=layerwise_recompute)
        self.mlp = GatedFeedForward(config, joined=facts.joined_inner, has_bias=facts.inner_bias)
        self.input_layernorm = modeling.Qwen2RMSNorm(config)
        self.post_attention_layernorm = modeling.Qwen2RMSNorm(config)
        # Set from outside where recomputation is wanted.
        self.enable_recompute, self.layerwise_recompute = False, layerwise_recompute
        self.recompute_granularity = config.recompute_granularity


class HeadDecoder(GatedDecoder, modeling.Qwen2Model):
    """The decoder without its output layer.

    Args:
        config: Sizes.
        facts: How the heads are.
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
        tables = RotaryTables(config.rope_theta, config.head_dim, halves=facts.halves)
        self.layers = nn.LayerList(
            HeadDecoderLayer(
                config, facts, tables, layerwise_recompute=number not in self.no_recompute_layers
            )
            for number in range(config.num_hidden_layers)
        )
        self.norm = modeling.Qwen2RMSNorm(config)

    def _visible(
        self, given: Any, shape: tuple[int, int], past_length: int, dtype: Any, position_ids: Any
    ) -> Any:
        # Masks of several texts in a row are met in training only, where nothing but a prefix is past.
        places = position_ids + past_length
        window = self.config.sliding_window if self.facts.windowed else None
        fused = self.config.use_flash_attention
        return visible_in_window(given, shape, past_length, places=places, window=window, fused=fused)


class HeadForCausalLM(modeling.Qwen2ForCausalLM):
    """The decoder with its output layer.

    `base_model_prefix` names the decoder in the names of parameters. A family whose facts depend on its config.json
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
        self.lm_head = modeling.Qwen2LMHead(config, embedding_weights=shared, transpose_y=tied)
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
        names = ["embed_tokens.weight", "norm.weight"]
        for number in range(config.num_hidden_layers):
            names += [f"layers.{number}.{name}" for name in _layer_tensors(cls.facts_of(config))]
        table = [_mapping(f"model.{_published(name)}", f"{cls.base_model_prefix}.{name}") for name in names]
        return table if config.tie_word_embeddings else [*table, _mapping("lm_head.weight", "lm_head.weight")]

    @classmethod
    def _get_fuse_or_split_param_mappings(cls, config: Any, is_fuse: bool = False) -> dict[Any, Any]:
        """PaddleNLP's functions that join and take apart layers, for the biases of feed-forward layers, too."""
        actions: dict[Any, Any] = super()._get_fuse_or_split_param_mappings(config, is_fuse=is_fuse)
        inner = {names: action for names, action in actions.items() if "gate_up_fused_proj" in names[-1]}
        for names, action in inner.items():
            actions[tuple(name.replace(".weight", ".bias") for name in names)] = action
        return actions


def _layer_tensors(facts: HeadFacts) -> list[str]:
    """Tensors of a layer as the files have them, by PaddleNLP's names."""
    inputs = ["query_key_value_proj"] if facts.joined_input else ["q_proj", "k_proj", "v_proj"]
    inner = ["gate_up_proj"] if facts.joined_inner else ["gate_proj", "up_proj"]
    layers = [f"self_attn.{name}" for name in (*inputs, "o_proj")]
    layers += [f"self_attn.{name}" for name in ("q_norm", "k_norm") if facts.normed]
    layers += [f"mlp.{name}" for name in (*inner, "down_proj")]
    biased = [f"self_attn.{name}" for name in inputs if facts.input_bias]
    biased += ["self_attn.o_proj"] if facts.output_bias else []
    biased += [f"mlp.{name}" for name in (*inner, "down_proj") if facts.inner_bias]
    layers += ["input_layernorm", "post_attention_layernorm"]
    return [*(f"{name}.weight" for name in layers), *(f"{name}.bias" for name in biased)]


def _published(name: str) -> str:
    return name.replace("query_key_value_proj", "qkv_proj")


def _mapping(theirs: str, ours: str) -> Any:
    """Matrices of linear layers are stored as [out, in] there."""
    is_matrix = theirs.endswith(("_proj.weight", "lm_head.weight"))
    return StateDictNameMapping(theirs, ours, "transpose" if is_matrix else None)
