"""GLM-4: half of a head turned, in neighbouring pairs; GLM-4-0414 also norms what attention and inner layers give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts, NormNames
from finetune.families.rotary_config import scaling_of

_FOUR_NORMS = NormNames(attention_output="post_self_attn_layernorm", inner_output="post_mlp_layernorm")


class GlmConfig(HeadConfig):
    """GLM-4's configuration, as Hugging Face's files have it.

    Args:
        attention_bias: Whether the projections to queries, keys and values have biases.
        partial_rotary_factor: Share of a head that rotary positions turn.
        **fields: As `HeadConfig` has them.
    """

    model_type = "glm"

    def __init__(self, attention_bias: bool = True, partial_rotary_factor: float = 0.5, **fields: Any):
        super().__init__(**fields)
        self.attention_bias, self.partial_rotary_factor = attention_bias, partial_rotary_factor


class Glm4Config(GlmConfig):
    """GLM-4-0414's configuration."""

    model_type = "glm4"


class GlmForCausalLM(HeadForCausalLM):
    """GLM-4 with its output layer."""

    config_class = GlmConfig
    base_model_prefix = "glm4"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Biases and the share of a head as the configuration has them."""
        return HeadFacts(
            halves=False,
            turned_share=config.partial_rotary_factor,
            scaling=scaling_of(config),
            input_bias=bool(config.attention_bias),
            joined_inner=True,
        )


class Glm4ForCausalLM(GlmForCausalLM):
    """GLM-4-0414 with its output layer."""

    config_class = Glm4Config

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """GLM-4's, with norms on the outputs."""
        return replace(super().facts_of(config), norms=_FOUR_NORMS)
