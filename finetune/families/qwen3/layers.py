"""Qwen3: heads of a size of their own, normed before they are turned."""

from __future__ import annotations

from finetune.families.head_attention import HeadFacts
from finetune.families.head_decoder import HeadConfig, HeadForCausalLM


class Qwen3Config(HeadConfig):
    """Qwen3's configuration."""

    model_type = "qwen3"


class Qwen3ForCausalLM(HeadForCausalLM):
    """Qwen3 with its output layer."""

    config_class = Qwen3Config
    base_model_prefix = "qwen3"
    facts = HeadFacts(normed=True)
