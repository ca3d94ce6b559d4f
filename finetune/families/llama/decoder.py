"""Llama for the static-graph export."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.decoder_description import DecoderDescription, array
from finetune.families.gated_decoder_description import describe_gated_decoder
from finetune.families.gated_layers import distance_slopes
from finetune.families.head_decoder_description import describe_head_decoder


def describe(model: Any) -> DecoderDescription:
    """The description of a PaddleNLP Llama, with rotary positions or with distances (`alibi`), or of our own."""
    if hasattr(model, "facts"):
        return describe_head_decoder(model)
    config, attention = model.config, model.llama.layers[0].self_attn
    slopes = array(distance_slopes(config.num_attention_heads)) if config.alibi else None
    return describe_gated_decoder(
        model,
        model.llama,
        rotary_frequencies=None if config.alibi else _frequencies(attention.rotary_emb),
        tied=bool(config.tie_word_embeddings),
        more={"distance_slopes": slopes},
    )


def _frequencies(rotary: Any) -> NDArray[Any]:
    """Linear scaling divides positions; Llama 3's is in PaddleNLP's frequencies already."""
    scale = getattr(rotary, "scaling_factor", 1.0)
    return (array(rotary.inv_freq) / np.float32(scale)).astype(np.float32)
