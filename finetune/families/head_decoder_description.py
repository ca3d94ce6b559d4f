"""Descriptions of the decoders around `HeadAttention`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.decoder_description import DecoderDescription, inverse_frequencies
from finetune.families.gated_decoder_description import describe_gated_decoder


def describe_head_decoder(model: Any) -> DecoderDescription:
    """Describes a `finetune.families.head_decoder.HeadForCausalLM`."""
    config, facts = model.config, model.facts
    head_dim = config.head_dim
    return describe_gated_decoder(
        model,
        model.get_decoder(),
        rotary_frequencies=inverse_frequencies(config.rope_theta, head_dim),
        head_dim=head_dim,
        head_order=None if facts.halves else _neighbours_apart(head_dim),
        window=(config.sliding_window or None) if facts.windowed else None,
        tied=bool(config.tie_word_embeddings),
    )


def _neighbours_apart(head_dim: int) -> NDArray[Any]:
    """Brings the two places of each pair of neighbours to i and i + head dim / 2."""
    places = np.arange(head_dim)
    order: NDArray[Any] = np.concatenate([places[::2], places[1::2]])
    return order
