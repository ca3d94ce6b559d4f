"""Qwen2 on the attention that is described by facts, for stretched rotary positions, which PaddleNLP's has not."""

from __future__ import annotations

from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts
from finetune.families.layer_windows import window_facts
from finetune.families.rotary_config import scaling_of


class Qwen2Config(HeadConfig):
    """The configuration of a Qwen2 with stretched rotary positions."""

    model_type = "qwen2"


class Qwen2ForCausalLM(HeadForCausalLM):
    """Qwen2 with its output layer."""

    config_class = Qwen2Config
    base_model_prefix = "qwen2"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Stretched positions and windows as the configuration has them."""
        return HeadFacts(input_bias=True, scaling=scaling_of(config), **window_facts(config))
