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
    head_dim, turned = config.head_dim, facts.turned_places(config.head_dim)
    still = np.zeros((head_dim - turned) // 2, np.float32)  # pairs that do not turn
    return describe_gated_decoder(
        model,
        model.get_decoder(),
        rotary_frequencies=np.concatenate([inverse_frequencies(config.rope_theta, turned), still]),
        head_dim=head_dim,
        head_order=_head_order(head_dim, turned, halves=facts.halves),
        window=(config.sliding_window or None) if facts.windowed else None,
        tied=bool(config.tie_word_embeddings),
    )


def _head_order(head_dim: int, turned: int, *, halves: bool) -> NDArray[Any] | None:
    """Brings the two places of each pair to i and i + head dim / 2: those that turn first, then the others."""
    if halves and turned == head_dim:
        return None
    places, rest = np.arange(turned), np.arange(turned, head_dim)
    first, second = np.split(places, 2) if halves else (places[::2], places[1::2])
    rest_first, rest_second = np.split(rest, 2)
    order: NDArray[Any] = np.concatenate([first, rest_first, second, rest_second])
    return order
