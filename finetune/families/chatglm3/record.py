"""ChatGLM3-6B and its models of 32k and 128k: ChatGLM2's architecture, a rotary base of its own, tokens for roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.families.chat_format import ChatFormat
from finetune.families.chatglm2.generation import (
    PLAIN_BASE,
    ROTARY_BASE,
    adapt_config,
    may_be,
    published_config,
)
from finetune.families.chatglm2.record import CHATGLM2, tiny_config
from finetune.families.family import register
from finetune.families.tiny_recipe import TinyShape

_TINY_BASE = 500000.0  # that of ChatGLM3-6B-32k


def _covers(config: Mapping[str, Any], folder: Path | None) -> bool:
    return may_be(3, config, folder)


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    return adapt_config(config, 3)


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return tiny_config(shape) | {ROTARY_BASE: _TINY_BASE}


def _hugging_face_config(config: dict[str, Any]) -> dict[str, Any]:
    """Only the code of the models of long texts reads `rope_ratio`."""
    is_long = config.get(ROTARY_BASE, PLAIN_BASE) != PLAIN_BASE
    return published_config(config, "chatglm3-6b-32k" if is_long else "chatglm3-6b")


CHATGLM3 = register(
    replace(
        CHATGLM2,
        name="chatglm3",
        models="ChatGLM3-6B, -32k, -128k",
        told_by="_name_or_path chatglm3..., or files of the tokenizer that name <|user|>",
        covers=_covers,
        adapt_config=_adapt_config,
        tokenizer=replace(CHATGLM2.tokenizer, chat_ends=("<|user|>", "<|observation|>")),
        chat_template="chatglm3",
        hugging_face=replace(
            CHATGLM2.hugging_face,
            config=_hugging_face_config,
            needs_files="configuration_chatglm.py and modeling_chatglm.py of THUDM/chatglm3-6b (with a rope_ratio other than 1: of "
            "-32k)",
        ),
        chat_formats={
            "chatglm3": ChatFormat(  # what opens a text, "[gMASK]sop", is put there by the family
                system="<|system|>\n {content}",
                user="<|user|>\n {content}<|assistant|>",
                tool="<|observation|>\n {content}<|assistant|>",
                answer="\n {content}",
                ends_with_next=True,
                special_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
            )
        },
        tiny=replace(CHATGLM2.tiny, config=_tiny_config),
        argument_folder="chatglm2",
    )
)
