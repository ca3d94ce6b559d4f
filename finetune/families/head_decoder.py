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

from finetune.families.gated_layers import GatedDecoder
from finetune.families.head_attention import HeadAttention, HeadFacts, RotaryTables

_LAYER_MATRICES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


class HeadConfig(Qwen2Config):
    """Configuration of a decoder whose heads have a size of their own.

    Args:
        head_dim: Size of a head; None: hidden size / heads.
        **fields: As PaddleNLP's Qwen2 has them.
    """

    def __init__(self, head_dim: int | None = None, **fields: Any):
        super().__init__(**fields)
        self.head_dim = head_dim or self.hidden_size // self.num_attention_heads


class HeadDecoderLayer(modeling.Qwen2DecoderLayer):
    """Attention and feed-forward layer of one depth."""

    def __init__(self, config: Any, facts: HeadFacts, tables: RotaryTables, *, layerwise_recompute: bool):
        super(modeling.Qwen2DecoderLayer, self).__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self.skip_recompute_ops: dict[str, bool] = {}
        self.self_attn = HeadAttention(config, facts, tables, layerwise_recompute=layerwise_recompute)
        self.mlp = modeling.Qwen2MLP(config)
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
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.hidden_size, self.sequence_parallel = config.hidden_size, config.sequence_parallel
        self.recompute_granularity = config.recompute_granularity
        self.no_recompute_layers = config.no_recompute_layers or []
        self.enable_recompute = False
        degree = config.tensor_parallel_degree
        is_split = degree > 1 and config.vocab_size % degree == 0
        embedding = VocabParallelEmbedding if is_split else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        num_turned = facts.turned_places(config.head_dim)
        tables = RotaryTables(config.rope_theta, num_turned, halves=facts.halves)
        self.layers = nn.LayerList(
            HeadDecoderLayer(
                config, facts, tables, layerwise_recompute=number not in self.no_recompute_layers
            )
            for number in range(config.num_hidden_layers)
        )
        self.norm = modeling.Qwen2RMSNorm(config)


class HeadForCausalLM(modeling.Qwen2ForCausalLM):
    """The decoder with its output layer.

    `base_model_prefix` names the decoder in the names of parameters.
    """

    config_class: ClassVar[Any] = HeadConfig
    facts: ClassVar[HeadFacts] = HeadFacts()

    def __init__(self, config: Any):
        super(modeling.Qwen2ForCausalLM, self).__init__(config)
        decoder = HeadDecoder(config, self.facts)
        self.add_sublayer(self.base_model_prefix, decoder)
        tied = bool(config.tie_word_embeddings)
        shared = decoder.embed_tokens.weight if tied else None
        self.lm_head = modeling.Qwen2LMHead(config, embedding_weights=shared, transpose_y=tied)
        if tied:
            self.tie_weights()
        self.criterion = modeling.Qwen2PretrainingCriterion(config)
        self.vocab_size = config.vocab_size

    @property
    def qwen2(self) -> Any:
        """The decoder, under the name by which PaddleNLP's methods know it."""
        return self._sub_layers[self.base_model_prefix]

    @classmethod
    def _get_name_mappings(cls, config: Any) -> list[Any]:
        """Hugging Face's names of all tensors, and PaddleNLP's."""
        facts = cls.facts
        biased = [f"self_attn.{name}_proj.bias" for name in "qkv"] if facts.input_bias else []
        biased += ["self_attn.o_proj.bias"] if facts.output_bias else []
        norms = [*_LAYER_NORMS, *(["self_attn.q_norm", "self_attn.k_norm"] if facts.normed else [])]
        plain = ["embed_tokens.weight", "norm.weight"]
        matrices = []
        for number in range(config.num_hidden_layers):
            plain += [f"layers.{number}.{name}" for name in biased]
            plain += [f"layers.{number}.{name}.weight" for name in norms]
            matrices += [f"layers.{number}.{name}.weight" for name in _LAYER_MATRICES]
        prefix = cls.base_model_prefix
        table = [StateDictNameMapping(f"model.{name}", f"{prefix}.{name}") for name in plain]
        table += [StateDictNameMapping(f"model.{name}", f"{prefix}.{name}", "transpose") for name in matrices]
        if not config.tie_word_embeddings:
            table.append(StateDictNameMapping("lm_head.weight", "lm_head.weight", "transpose"))
        return table
