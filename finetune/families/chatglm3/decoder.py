"""ChatGLM3 for the static-graph export: as ChatGLM2, whose description reads the rotary base from the config."""

from __future__ import annotations

from typing import Any

from finetune.families.chatglm2.decoder import describe as describe_chatglm2
from finetune.families.decoder_description import DecoderDescription


def describe(model: Any) -> DecoderDescription:
    """The description of a ChatGLM3."""
    return describe_chatglm2(model)
