"""Descriptions of the decoders around `HeadAttention`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.decoder_description import DecoderDescription, array
from finetune.families.gated_decoder_description import describe_gated_decoder
from finetune.families.gated_layers import distance_slopes
from finetune.families.head_facts import RotaryAngles


def describe_head_decoder(model: Any) -> DecoderDescription:
    """Describes a `finetune.families.head_decoder.HeadForCausalLM`."""
    config, facts = model.config, model.facts
    head_dim = config.head_dim
    angles = RotaryAngles.of(facts, base=config.rope_theta, head_dim=head_dim)
    turns = bool(facts.turned_share) and not facts.distances
    still = np.zeros(head_dim // 2 - len(angles.frequencies), np.float32)  # pairs that do not turn
    return describe_gated_decoder(
        model,
        model.get_decoder(),
        rotary_frequencies=None if not turns else np.concatenate([angles.frequencies, still]),
        norms=facts.norms,
        norm_offset=facts.norm_offset,
        tied=bool(config.tie_word_embeddings),
        normed_head=facts.normed_head,
        more={
            "rotary_amplitude": angles.amplitude,
            "local_frequencies": None if angles.local is None else np.concatenate([angles.local, still]),
            "positions": array(model.get_decoder().embed_positions.weight)
            if facts.learned_positions
            else None,
            "distance_slopes": array(distance_slopes(config.num_attention_heads))
            if facts.distances
            else None,
            "rounded_divisor": facts.rounded_divisor if facts.distances else None,
        },
        gated=facts.gated,
        parallel_branches=facts.parallel_branches,
        residual_from_norm=facts.norm_factor is not None,
        residual_factor=facts.norm_factor or 1.0,
        activation=facts.activation,
        embedding_scale=facts.embedding_scale,
        head_dim=head_dim,
        max_positions=config.text_positions or config.max_position_embeddings,
        window=facts.window,
        windowed_layers=facts.windowed_layers,
        turned_layers=facts.turned_layers,
        score_scale=facts.score_scale,
        score_cap=facts.score_cap,
        logit_cap=facts.logit_cap,
        logit_divisor=facts.logit_divisor,
        branch_scale=facts.branch_scale,
        head_order=_head_order(head_dim, 2 * len(angles.frequencies), halves=facts.halves) if turns else None,
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
