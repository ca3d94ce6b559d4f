"""The form of conversations of Qwen up to its second generation."""

from __future__ import annotations

from finetune.families.chat_format import CHATML, ChatFormat

QWEN_FORMAT = ChatFormat(**{**vars(CHATML), "default_system": "You are a helpful assistant."})
