"""Mixtral: Mistral's attention, and experts in every layer."""

from __future__ import annotations

from typing import Any

from finetune.families.expert_facts import ExpertFacts
from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts
from finetune.families.rotary_config import scaling_of


class MixtralConfig(HeadConfig):
    """Mixtral's configuration."""

    model_type = "mixtral"


class MixtralForCausalLM(HeadForCausalLM):
    """Mixtral with its output layer."""

    config_class = MixtralConfig
    base_model_prefix = "mixtral"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Experts; a window and stretched positions where the configuration has them."""
        experts = ExpertFacts(
            num_routed=int(config.num_local_experts),
            num_chosen=int(config.num_experts_per_tok),
            inner_size=int(config.intermediate_size),
            normalised=True,
        )
        return HeadFacts(window=config.sliding_window or None, scaling=scaling_of(config), experts=experts)
