"""The form of conversations of all generations of Gemma."""

from __future__ import annotations

from finetune.families.chat_format import ChatFormat

GEMMA_FORMAT = ChatFormat(
    opening="<bos>",
    system="{content}\n\n",
    user="<start_of_turn>user\n{system}{content}<end_of_turn>\n<start_of_turn>model\n",
    end="<end_of_turn>",
    trims=("user", "answer"),
    after="\n",
    special_tokens=("<bos>", "<start_of_turn>", "<end_of_turn>"),
)
