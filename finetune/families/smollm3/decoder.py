"""SmolLM3 for the static-graph export."""

from __future__ import annotations

from typing import Any

from finetune.families.decoder_description import DecoderDescription
from finetune.families.head_decoder_description import describe_head_decoder


def describe(model: Any) -> DecoderDescription:
    """The description of a SmolLM3."""
    return describe_head_decoder(model)
