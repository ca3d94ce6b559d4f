"""The forms of conversations of Phi-3 and Phi-4."""

from __future__ import annotations

from finetune.families.chat_format import ChatFormat

CHAT_FORMATS = {
    "phi3": ChatFormat(
        system="<|system|>\n{content}<|end|>\n",
        user="<|user|>\n{content}<|end|>\n<|assistant|>\n",
        end="<|end|>",
        after="\n",
        special_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "phi4": ChatFormat(
        system="<|im_start|>system<|im_sep|>{content}<|im_end|>",
        user="<|im_start|>user<|im_sep|>{content}<|im_end|><|im_start|>assistant<|im_sep|>",
        end="<|im_end|>",
        special_tokens=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "phi4_mini": ChatFormat(
        system="<|system|>{content}<|end|>",
        user="<|user|>{content}<|end|><|assistant|>",
        end="<|end|>",
        special_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
}
