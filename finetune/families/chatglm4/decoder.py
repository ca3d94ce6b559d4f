"""GLM-4 in its first form for the static-graph export: as ChatGLM3."""

from __future__ import annotations

from typing import Any

from finetune.families.chatglm2.decoder import describe as describe_chatglm2
from finetune.families.decoder_description import DecoderDescription


def describe(model: Any) -> DecoderDescription:
    """The description of a GLM-4."""
    return describe_chatglm2(model)
