"""XVERSE: Llama's layers."""

from __future__ import annotations

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM


class XverseConfig(HeadConfig):
    """XVERSE's configuration."""

    model_type = "xverse"


class XverseForCausalLM(HeadForCausalLM):
    """XVERSE with its output layer."""

    config_class = XverseConfig
    base_model_prefix = "xverse"
