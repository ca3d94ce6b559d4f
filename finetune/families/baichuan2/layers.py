"""Baichuan 2: Baichuan's layers under its own name."""

from __future__ import annotations

from finetune.families.baichuan.layers import BaichuanConfig, BaichuanForCausalLM


class Baichuan2Config(BaichuanConfig):
    """Baichuan 2's configuration."""

    model_type = "baichuan2"


class Baichuan2ForCausalLM(BaichuanForCausalLM):
    """Baichuan 2 with its output layer."""

    config_class = Baichuan2Config
    base_model_prefix = "baichuan2"
