"""ERNIE 4.5 (dense): heads of a size of their own, neighbouring places turned together."""

from __future__ import annotations

from finetune.families.head_attention import HeadFacts
from finetune.families.head_decoder import HeadConfig, HeadForCausalLM


class Ernie45Config(HeadConfig):
    """ERNIE 4.5's configuration."""

    model_type = "ernie4_5"


class Ernie4_5ForCausalLM(HeadForCausalLM):
    """ERNIE 4.5 with its output layer."""

    config_class = Ernie45Config
    base_model_prefix = "ernie4_5"
    facts = HeadFacts(halves=False)
