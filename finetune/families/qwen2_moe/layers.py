"""Qwen2-MoE: Qwen2's attention, experts, and one for all tokens beside them."""

from __future__ import annotations

from typing import Any

from finetune.families.expert_config import expert_facts
from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts
from finetune.families.layer_windows import window_facts
from finetune.families.rotary_config import scaling_of


class Qwen2MoeConfig(HeadConfig):
    """Qwen2-MoE's configuration."""

    model_type = "qwen2_moe"


class Qwen2MoeForCausalLM(HeadForCausalLM):
    """Qwen2-MoE with its output layer."""

    config_class = Qwen2MoeConfig
    base_model_prefix = "qwen2_moe"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Biases, windows and experts as the configuration has them."""
        return HeadFacts(
            input_bias=bool(config.qkv_bias),
            scaling=scaling_of(config),
            experts=expert_facts(config),
            **window_facts(config),
        )
