"""The tokenizer of a tiny checkpoint."""

from __future__ import annotations

from finetune.families.text_patterns import QWEN_PATTERN
from finetune.families.tiny_recipe import ByteLevelKind

QWEN2_TOKENIZER = ByteLevelKind(
    special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    roles={"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
    pattern=QWEN_PATTERN,
    special_first=False,
    one_file=False,
    settings={
        "tokenizer_class": "Qwen2Tokenizer",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    },
)
