"""Gemma 1: tanh-GELU, norms whose weights are differences from one, word embeddings scaled up.

PaddleNLP's feed-forward layer computes the exact GELU whatever the config says, and its norms add the one in the type of
the weights; the published weights were trained with the tanh approximation and in float32.
"""

from __future__ import annotations

from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts


class GemmaConfig(HeadConfig):
    """Gemma's configuration.

    Args:
        head_dim: Size of a head.
        tie_word_embeddings: Always true.
        **fields: As `HeadConfig` has them.
    """

    model_type = "gemma"

    def __init__(self, head_dim: int = 256, tie_word_embeddings: bool = True, **fields: Any):
        super().__init__(head_dim=head_dim, tie_word_embeddings=tie_word_embeddings, **fields)


class GemmaForCausalLM(HeadForCausalLM):
    """Gemma with its output layer, which is the input embedding."""

    config_class = GemmaConfig
    base_model_prefix = "gemma"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """All models are alike; word embeddings are scaled up by the square root of their size."""
        return HeadFacts(activation="gelu_tanh", norm_offset=1.0, embedding_scale=config.hidden_size**0.5)
