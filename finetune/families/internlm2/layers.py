"""InternLM2: Llama's layers, queries, keys and values from one layer in groups."""

from __future__ import annotations

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts


class InternLM2Config(HeadConfig):
    """InternLM2's configuration."""

    model_type = "internlm2"


class InternLM2ForCausalLM(HeadForCausalLM):
    """InternLM2 with its output layer."""

    config_class = InternLM2Config
    base_model_prefix = "internlm2"
    facts = HeadFacts(joined_input=True, grouped_input=True)
