"""Qwen3 for the static-graph export."""

from __future__ import annotations

from typing import Any

from finetune.families.decoder_description import DecoderDescription, inverse_frequencies
from finetune.families.gated_decoder_description import describe_gated_decoder


def describe(model: Any) -> DecoderDescription:
    """The description of a Qwen3."""
    config = model.config
    return describe_gated_decoder(
        model,
        model.qwen3,
        rotary_frequencies=inverse_frequencies(config.rope_theta, config.head_dim),
        head_dim=config.head_dim,
        tied=bool(config.tie_word_embeddings),
    )
