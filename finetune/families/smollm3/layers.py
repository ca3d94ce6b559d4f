"""SmolLM3: Llama's layers, of which some know no positions."""

from __future__ import annotations

from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts
from finetune.families.rotary_config import scaling_of


class SmolLM3Config(HeadConfig):
    """SmolLM3's configuration.

    Args:
        no_rope_layers: For each layer 1 where rotary positions turn its heads, and 0 where they do not.
        attention_bias: Whether the projections of attention have biases.
        mlp_bias: Whether the feed-forward layers have.
        **fields: As `HeadConfig` has them.
    """

    model_type = "smollm3"

    def __init__(
        self,
        no_rope_layers: list[int] | None = None,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        **fields: Any,
    ):
        super().__init__(**fields)
        self.no_rope_layers = no_rope_layers
        self.attention_bias, self.mlp_bias = attention_bias, mlp_bias


class SmolLM3ForCausalLM(HeadForCausalLM):
    """SmolLM3 with its output layer."""

    config_class = SmolLM3Config
    base_model_prefix = "smollm3"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Layers without positions (Kazemnejad et al. 2023) and biases as the configuration has them."""
        layers = config.no_rope_layers
        return HeadFacts(
            turned_layers=None if layers is None else tuple(map(bool, layers)),
            scaling=scaling_of(config),
            input_bias=bool(config.attention_bias),
            output_bias=bool(config.attention_bias),
            inner_bias=bool(config.mlp_bias),
        )
