"""Phi-3: queries, keys and values from one layer, gate and up projection from another, a sliding window."""

from __future__ import annotations

from typing import Any

from finetune.families.head_attention import HeadFacts
from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.rotary_config import scaling_of


class Phi3Config(HeadConfig):
    """Phi-3's configuration.

    Args:
        original_max_position_embeddings: Tokens of the texts of pretraining.
        partial_rotary_factor: Share of a head that rotary positions turn.
        **fields: As `HeadConfig` has them.
    """

    model_type = "phi3"

    def __init__(
        self,
        original_max_position_embeddings: int | None = None,
        partial_rotary_factor: float = 1.0,
        **fields: Any,
    ):
        super().__init__(**fields)
        self.original_max_position_embeddings = original_max_position_embeddings
        self.partial_rotary_factor = partial_rotary_factor


class Phi3ForCausalLM(HeadForCausalLM):
    """Phi-3 with its output layer."""

    config_class = Phi3Config
    base_model_prefix = "phi3"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Joined layers; a window, a share of a head and stretched positions as the configuration has them."""
        return HeadFacts(
            window=config.sliding_window or None,
            turned_share=config.partial_rotary_factor,
            scaling=scaling_of(config),
            joined_input=True,
            joined_inner=True,
        )
