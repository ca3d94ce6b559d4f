"""Phi-3: queries, keys and values from one layer, gate and up projection from another, a sliding window."""

from __future__ import annotations

from typing import Any

from finetune.families.head_attention import HeadFacts
from finetune.families.head_decoder import HeadConfig, HeadForCausalLM


class Phi3Config(HeadConfig):
    """Phi-3's configuration."""

    model_type = "phi3"


class Phi3ForCausalLM(HeadForCausalLM):
    """Phi-3 with its output layer."""

    config_class = Phi3Config
    base_model_prefix = "phi3"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Joined layers; a window where the configuration has one."""
        return HeadFacts(window=config.sliding_window or None, joined_input=True, joined_inner=True)
