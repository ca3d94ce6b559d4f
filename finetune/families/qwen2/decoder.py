"""Qwen2 for the static-graph export."""

from __future__ import annotations

from typing import Any

from finetune.families.decoder_description import DecoderDescription
from finetune.families.gated_decoder_description import describe_gated_decoder
from finetune.families.head_decoder_description import describe_head_decoder
from finetune.families.rotary_scaling import inverse_frequencies


def describe(model: Any) -> DecoderDescription:
    """The description of a PaddleNLP Qwen2, or of our own."""
    if hasattr(model, "facts"):
        return describe_head_decoder(model)
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    return describe_gated_decoder(
        model,
        model.qwen2,
        rotary_frequencies=inverse_frequencies(config.rope_theta, head_dim),
        tied=bool(config.tie_word_embeddings),
    )
