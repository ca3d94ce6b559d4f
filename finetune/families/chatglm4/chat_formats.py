"""The form of conversations of GLM-4."""

from __future__ import annotations

from finetune.families.chat_format import ChatFormat, ToolFormat

GLM4_FORMAT = ChatFormat(
    opening="[gMASK]<sop>",
    system="<|system|>\n{content}",
    user="<|user|>\n{content}<|assistant|>",
    tool="<|observation|>\n{content}<|assistant|>",
    answer="\n{content}",
    ends_with_next=True,
    special_tokens=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    tools=ToolFormat(
        head="# 可用工具\n",
        function="\n## {name}\n\n{json}\n在调用上述函数时，请使用 Json 格式表示调用的参数。",
        call="{name}\n{arguments}",
        opening="<|assistant|>",
    ),
)
