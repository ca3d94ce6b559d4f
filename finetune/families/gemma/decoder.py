"""Gemma for the static-graph export."""

from __future__ import annotations

from typing import Any

from finetune.families.decoder_description import DecoderDescription
from finetune.families.gated_decoder_description import describe_gated_decoder
from finetune.families.rotary_scaling import inverse_frequencies


def describe(model: Any) -> DecoderDescription:
    """The description of a Gemma."""
    config = model.config
    return describe_gated_decoder(
        model,
        model.gemma,
        rotary_frequencies=inverse_frequencies(config.rope_theta, config.head_dim),
        activation="gelu_tanh",
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        head_dim=config.head_dim,
        tied=True,
    )
