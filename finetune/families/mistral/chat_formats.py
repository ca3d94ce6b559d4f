"""The forms of conversations of Mistral's models."""

from __future__ import annotations

from finetune.families.chat_format import ChatFormat

CHAT_FORMATS = {
    "mistral": ChatFormat(
        opening="<s>",
        system="{content}\n\n",
        user="[INST] {system}{content} [/INST]",
        answer=" {content}",
        special_tokens=("<s>",),
    ),
    "mistral_small": ChatFormat(
        opening="<s>",
        system="[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]",
        user="[INST]{content}[/INST]",
        special_tokens=("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    ),
}
