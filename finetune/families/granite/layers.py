"""Granite: Llama's layers with a factor on embeddings, scores and branches each, and logits that are divided."""

from __future__ import annotations

from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts
from finetune.families.rotary_config import scaling_of


class GraniteConfig(HeadConfig):
    """Granite's configuration.

    Args:
        embedding_multiplier: Factor on word embeddings.
        attention_multiplier: Factor on scores, in the place of 1 / sqrt(head dim).
        residual_multiplier: Factor on what each branch gives.
        logits_scaling: What the logits are divided by.
        attention_bias: Whether the projections of attention have biases.
        mlp_bias: Whether the feed-forward layers have.
        **fields: As `HeadConfig` has them.
    """

    model_type = "granite"

    def __init__(
        self,
        embedding_multiplier: float = 1.0,
        attention_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
        logits_scaling: float = 1.0,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        **fields: Any,
    ):
        super().__init__(**fields)
        self.embedding_multiplier, self.attention_multiplier = embedding_multiplier, attention_multiplier
        self.residual_multiplier, self.logits_scaling = residual_multiplier, logits_scaling
        self.attention_bias, self.mlp_bias = attention_bias, mlp_bias


class GraniteForCausalLM(HeadForCausalLM):
    """Granite with its output layer."""

    config_class = GraniteConfig
    base_model_prefix = "granite"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Factors and biases as the configuration has them."""
        return HeadFacts(
            scaling=scaling_of(config),
            input_bias=bool(config.attention_bias),
            output_bias=bool(config.attention_bias),
            inner_bias=bool(config.mlp_bias),
            branch_scale=float(config.residual_multiplier),
            score_scale=float(config.attention_multiplier),
            embedding_scale=float(config.embedding_multiplier),
            logit_divisor=float(config.logits_scaling),
        )
