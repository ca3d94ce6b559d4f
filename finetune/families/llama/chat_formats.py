"""The forms of conversations of Llama and of models of its shape."""

from __future__ import annotations

from finetune.families.chat_format import CHATML, ChatFormat

_LLAMA3_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"
_LLAMA3_ANSWER = "<|eot_id|>" + _LLAMA3_HEADER.replace("{role}", "assistant")

CHAT_FORMATS = {
    "llama2": ChatFormat(
        system="<<SYS>>\n{content}\n<</SYS>>\n\n",
        user="<s>[INST] {system}{content} [/INST]",
        answer=" {content} ",
        trims=("user", "answer"),
        special_tokens=("<s>",),
    ),
    "llama3": ChatFormat(
        opening="<|begin_of_text|>",
        system=_LLAMA3_HEADER.replace("{role}", "system") + "{content}<|eot_id|>",
        user=_LLAMA3_HEADER.replace("{role}", "user") + "{content}" + _LLAMA3_ANSWER,
        tool=_LLAMA3_HEADER.replace("{role}", "ipython") + "{content}" + _LLAMA3_ANSWER,
        end="<|eot_id|>",
        trims=("system", "user", "answer"),
        special_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "yi": CHATML,
    "ziya": ChatFormat(user="<human>:{content}\n<bot>:", after="\n"),
    "openbuddy": ChatFormat(
        system="{content}\n\n", user="User: {content}\nAssistant:", answer=" {content}", after="\n"
    ),
}
