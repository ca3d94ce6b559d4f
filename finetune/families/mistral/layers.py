"""Mistral: a sliding window, and heads whose size need not be hidden size / heads (Nemo)."""

from __future__ import annotations

from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts
from finetune.families.layer_windows import window_facts
from finetune.families.rotary_config import scaling_of


class MistralConfig(HeadConfig):
    """Mistral's configuration."""

    model_type = "mistral"


class MistralForCausalLM(HeadForCausalLM):
    """Mistral with its output layer.

    A token sees the last `sliding_window` tokens, itself included (Jiang et al., "Mistral 7B", 2023).
    """

    config_class = MistralConfig
    base_model_prefix = "mistral"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """The window and stretched positions as the configuration has them."""
        return HeadFacts(window=config.sliding_window or None, scaling=scaling_of(config))


class MinistralConfig(MistralConfig):
    """Ministral's configuration."""

    model_type = "ministral"


class MinistralForCausalLM(MistralForCausalLM):
    """Mistral with the window in some layers."""

    config_class = MinistralConfig

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """The layers with a window, and stretched positions, as the configuration has them."""
        return HeadFacts(scaling=scaling_of(config), **window_facts(config))
