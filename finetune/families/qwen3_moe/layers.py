"""Qwen3-MoE: Qwen3's attention, and experts in most layers."""

from __future__ import annotations

from typing import Any

from finetune.families.expert_config import expert_facts
from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts
from finetune.families.layer_windows import window_facts
from finetune.families.rotary_config import scaling_of


class Qwen3MoeConfig(HeadConfig):
    """Qwen3-MoE's configuration."""

    model_type = "qwen3_moe"


class Qwen3MoeForCausalLM(HeadForCausalLM):
    """Qwen3-MoE with its output layer."""

    config_class = Qwen3MoeConfig
    base_model_prefix = "qwen3_moe"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Normed heads; windows and experts as the configuration has them."""
        facts = window_facts(config)
        return HeadFacts(normed=True, scaling=scaling_of(config), experts=expert_facts(config), **facts)
