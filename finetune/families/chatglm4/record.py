"""GLM-4-9B as first published (`chatglm`): ChatGLM3's architecture, a larger vocabulary that tiktoken reads.

The chat models of 128k and 1M tokens differ in `rope_ratio` and sizes alone. Hugging Face's form of the same weights
is the family `glm4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.families.chatglm2.generation import (
    GENERATION,
    ROTARY_BASE,
    adapt_config,
    may_be,
    published_config,
)
from finetune.families.chatglm2.record import tiny_config
from finetune.families.chatglm3.record import CHATGLM3
from finetune.families.chatglm4.chat_formats import GLM4_FORMAT
from finetune.families.family import register
from finetune.families.tiny_recipe import TinyShape

_TINY_BASE = 5000000.0  # that of GLM-4-9B-chat


def _covers(config: Mapping[str, Any], folder: Path | None) -> bool:
    return may_be(4, config, folder)


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    return adapt_config(config, 4)


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return tiny_config(shape) | {ROTARY_BASE: _TINY_BASE, GENERATION: 4}


def _hugging_face_config(config: dict[str, Any]) -> dict[str, Any]:
    """Its code reads some sizes by both their names."""
    published = published_config(config, "glm-4-9b")
    twice = {"num_hidden_layers": published["num_layers"], "vocab_size": published["padded_vocab_size"]}
    return published | twice


CHATGLM4 = register(
    replace(
        CHATGLM3,
        name="chatglm4",
        models="GLM-4-9B (`chatglm`), CodeGeeX4",
        told_by="a padded_vocab_size above 150000, or tokenizer_class ChatGLM4Tokenizer",
        covers=_covers,
        adapt_config=_adapt_config,
        tokenizer=replace(
            CHATGLM3.tokenizer,
            prefix=("[gMASK]", "<sop>"),
            pad_fallback="<|endoftext|>",
            tokenizer_class="finetune.families.chatglm4.tokenizer.ChatGLM4Tokenizer",
        ),
        chat_template="glm4",
        chat_formats={"glm4": GLM4_FORMAT},
        hugging_face=replace(
            CHATGLM3.hugging_face,
            config=_hugging_face_config,
            needs_files="configuration_chatglm.py and modeling_chatglm.py of THUDM/glm-4-9b",
        ),
        tiny=replace(CHATGLM3.tiny, tokenizer="tiktoken_glm4", config=_tiny_config),
    )
)
