"""Baichuan: Llama's layers with one projection to queries, keys and values, and distances in the models of 13B."""

from __future__ import annotations

from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts


class BaichuanConfig(HeadConfig):
    """Baichuan's configuration.

    Args:
        has_distances: Whether scores get distances in place of rotary positions.
        normed_head: Whether the output layer divides its weights by their length.
        **fields: As `HeadConfig` has them.
    """

    model_type = "baichuan"

    def __init__(self, has_distances: bool = False, normed_head: bool = False, **fields: Any):
        super().__init__(**fields)
        self.has_distances, self.normed_head = has_distances, normed_head


class BaichuanForCausalLM(HeadForCausalLM):
    """Baichuan with its output layer."""

    config_class = BaichuanConfig
    base_model_prefix = "baichuan"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Positions and output layer as the configuration has them."""
        return HeadFacts(
            joined_input=True, distances=bool(config.has_distances), normed_head=bool(config.normed_head)
        )
