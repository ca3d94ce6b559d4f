"""Qwen3: heads of a size of their own, normed before they are turned."""

from __future__ import annotations

from typing import Any

from finetune.families.head_attention import HeadFacts
from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.layer_windows import window_facts
from finetune.families.rotary_config import scaling_of


class Qwen3Config(HeadConfig):
    """Qwen3's configuration."""

    model_type = "qwen3"


class Qwen3ForCausalLM(HeadForCausalLM):
    """Qwen3 with its output layer."""

    config_class = Qwen3Config
    base_model_prefix = "qwen3"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Normed heads; stretched positions and windows where the configuration asks for them."""
        return HeadFacts(normed=True, scaling=scaling_of(config), **window_facts(config))
