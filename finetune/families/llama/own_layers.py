"""Llama on the attention that is described by facts, for what PaddleNLP's has not."""

from __future__ import annotations

from typing import Any

from finetune.families.head_attention import HeadFacts
from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.rotary_config import scaling_of


class LlamaConfig(HeadConfig):
    """The configuration of a Llama whose layers have biases, or heads of a size of their own.

    Args:
        attention_bias: Whether the projections to and from heads have biases.
        mlp_bias: Whether the feed-forward layers have biases.
        **fields: As `HeadConfig` has them.
    """

    model_type = "llama"

    def __init__(self, attention_bias: bool = False, mlp_bias: bool = False, **fields: Any):
        super().__init__(**fields)
        self.attention_bias, self.mlp_bias = attention_bias, mlp_bias


class LlamaForCausalLM(HeadForCausalLM):
    """Llama with biases, or heads of a size of their own, which PaddleNLP's lacks."""

    config_class = LlamaConfig
    base_model_prefix = "llama"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Biases and stretched positions as the configuration has them."""
        bias = bool(config.attention_bias)
        return HeadFacts(
            scaling=scaling_of(config), input_bias=bias, output_bias=bias, inner_bias=bool(config.mlp_bias)
        )
