"""Gemma 3 (text): normed heads, windows in five of six layers, which have a rotary base of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune.families.gemma2.layers import GemmaConfig, gemma_facts
from finetune.families.head_decoder import HeadForCausalLM
from finetune.families.head_facts import HeadFacts
from finetune.families.rotary_config import scaling_of


class Gemma3TextConfig(GemmaConfig):
    """Gemma 3's configuration.

    Args:
        rope_local_base_freq: Base of the angles in layers with a window.
        **fields: As `GemmaConfig` has them.
    """

    model_type = "gemma3_text"

    def __init__(self, rope_local_base_freq: float = 10000.0, **fields: Any):
        super().__init__(**fields)
        self.rope_local_base_freq = rope_local_base_freq


class Gemma3ForCausalLM(HeadForCausalLM):
    """Gemma 3 with its output layer."""

    config_class = Gemma3TextConfig
    base_model_prefix = "gemma3"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Windows, factors and both bases as the configuration has them."""
        return replace(
            gemma_facts(config),
            normed=True,
            local_base=config.rope_local_base_freq,
            scaling=scaling_of(config),
        )
