"""ChatGLM-6B for the static-graph export."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.chatglm.config import stored_frequencies
from finetune.families.decoder_description import DecoderDescription
from finetune.families.head_decoder_description import describe_head_decoder


def describe(model: Any) -> DecoderDescription:
    """The description of a ChatGLM-6B."""
    config = model.config
    frequencies = stored_frequencies(config.rope_theta, config.head_dim // 2)  # [head dim / 4]
    plain = describe_head_decoder(model)
    return replace(
        plain,
        rotary_frequencies=np.tile(frequencies, 2),
        shape=replace(
            plain.shape, context_marks=config.context_marks, head_order=_head_order(config.head_dim)
        ),
    )


def _head_order(head_dim: int) -> NDArray[Any]:
    """Brings the pairs of both halves of a head, each paired within its half, to i and i + head dim / 2."""
    quarters = np.arange(head_dim).reshape(2, 2, -1)
    order: NDArray[Any] = quarters.transpose(1, 0, 2).ravel()
    return order
