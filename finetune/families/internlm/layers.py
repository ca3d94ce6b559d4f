"""InternLM: Llama's layers, with biases on the projections to and from heads in the models of 7B."""

from __future__ import annotations

from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts


class InternLMConfig(HeadConfig):
    """InternLM's configuration.

    Args:
        bias: Whether the projections to and from heads have biases.
        **fields: As `HeadConfig` has them.
    """

    model_type = "internlm"

    def __init__(self, bias: bool = True, **fields: Any):
        super().__init__(**fields)
        self.bias = bias


class InternLMForCausalLM(HeadForCausalLM):
    """InternLM with its output layer."""

    config_class = InternLMConfig
    base_model_prefix = "internlm"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Biases as the configuration has them."""
        return HeadFacts(input_bias=bool(config.bias), output_bias=bool(config.bias))
