"""The conversation formats of well-known model families, by name.

Each string is the one that the family's publisher trained with; tests/data/test_chat_templates.py shows
every one of them written out. A pattern holds ``{content}``; in a user's also ``{round}`` (counted from
`first_round`) and, where the system text stands inside the first user's message, ``{system}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.data.reading.conversation import TOOL, TOOL_CALL, USER, Conversation, Message
from finetune.data.templates.pieces import Piece, PieceWriter, Slot, parse_pattern
from finetune.data.templates.tool_calls import ToolFormat


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a family writes conversations.

    Attributes:
        user: A user's message and all that stands before the answer.
        only_user: The same where it is the only one; None: `user`.
        first_round: Number of the first round.
        answer: The answer; learned whole.
        tool: The same as `user` for what a tool returned; None writes it as a user's message.
        system: The system text.
        opening: What every conversation begins with.
        end: The special token that ends an answer, learned; "" leaves that to end-of-sequence.
        ends_with_next: Whether the special token that opens the next message ends an answer, and is learned; the last
            answer ends with the one of a user's message, a call of a function with that of its result.
        after: What follows an answer before the next message; not learned.
        trims: Whose texts lose the blanks at their ends: "system", "user" (and what tools returned), "answer".
        default_system: The system text of conversations that have none.
        special_tokens: What in these strings is a special token.
        tools: How functions on offer, in a system text of their own, and calls of them are written; None writes JSON
            into the system text and calls as the text of an answer.
    """

    user: str
    answer: str = "{content}"
    only_user: str | None = None
    first_round: int = 1
    tool: str | None = None
    system: str = "{content}"
    opening: str = ""
    end: str = ""
    ends_with_next: bool = False
    after: str = ""
    trims: tuple[str, ...] = ()
    default_system: str | None = None
    special_tokens: tuple[str, ...] = ()
    tools: ToolFormat | None = None


_CHATML = ChatFormat(
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    tool="<|im_start|>tool\n{content}<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    special_tokens=("<|im_start|>", "<|im_end|>"),
)
_LLAMA3_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"
_LLAMA3_ANSWER = "<|eot_id|>" + _LLAMA3_HEADER.replace("{role}", "assistant")

CHAT_FORMATS: dict[str, ChatFormat] = {
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
    "chatml": _CHATML,
    "qwen": ChatFormat(**{**vars(_CHATML), "default_system": "You are a helpful assistant."}),
    "chatglm": ChatFormat(  # what stands before an answer, "[gMASK]<sop>", is put there by the family
        system="{content}\n",
        user="[Round {round}]\n问：{content}\n答：",
        only_user="{content}",
        first_round=0,
        after="\n",
    ),
    "chatglm2": ChatFormat(
        system="{content}\n\n",
        user="[Round {round}]\n\n问：{content}\n\n答：",
        after="\n\n",
    ),
    "chatglm3": ChatFormat(  # what opens a text, "[gMASK]sop", is put there by the family
        system="<|system|>\n {content}",
        user="<|user|>\n {content}<|assistant|>",
        tool="<|observation|>\n {content}<|assistant|>",
        answer="\n {content}",
        ends_with_next=True,
        special_tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
    "glm4": ChatFormat(
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
    ),
    "internlm": ChatFormat(
        system="<|System|>:{content}\n",
        user="<|User|>:{content}\n<|Bot|>:",
        end="<eoa>",
        after="\n",
        special_tokens=("<eoa>",),
    ),
    "internlm_eoh": ChatFormat(  # of the first InternLM-chat-7B
        system="<|System|>:{content}\n",
        user="<|User|>:{content}<eoh>\n<|Bot|>:",
        end="<eoa>",
        after="\n",
        special_tokens=("<eoh>", "<eoa>"),
    ),
    "xverse": ChatFormat(system="{content}\n\n", user="Human: {content}\n\nAssistant: "),
    "internlm2": _CHATML,
    "yi": _CHATML,
    "ernie4_5": ChatFormat(
        opening="<|begin_of_sentence|>",
        system="{content}\n",
        user="User: {content}\nAssistant: ",
        end="<|end_of_sentence|>",
        special_tokens=("<|begin_of_sentence|>", "<|end_of_sentence|>"),
    ),
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
    "falcon": ChatFormat(
        system="System: {content}\n", user="User: {content}\nFalcon:", answer=" {content}", after="\n"
    ),
    "granite": ChatFormat(
        system="<|start_of_role|>system<|end_of_role|>{content}<|end_of_text|>\n",
        user="<|start_of_role|>user<|end_of_role|>{content}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        end="<|end_of_text|>",
        after="\n",
        special_tokens=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ),
    "polylm": ChatFormat(system="{content}\n", user="<|user|>\n{content}\n<|assistant|>\n", after="\n"),
    "seqgpt": ChatFormat(system="{content}\n", user="输入: {content}\n输出: [GEN]", after="\n"),
    "bloomz": ChatFormat(system="{content}\n", user="{content}", answer=" {content}", after="\n"),
    "ziya": ChatFormat(user="<human>:{content}\n<bot>:", after="\n"),
    "openbuddy": ChatFormat(
        system="{content}\n\n", user="User: {content}\nAssistant:", answer=" {content}", after="\n"
    ),
    "alpaca": ChatFormat(
        system="{content}\n\n",
        user="### Instruction:\n{content}\n\n### Response:\n",
        after="\n\n",
        default_system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
        ),
    ),
    "baichuan": ChatFormat(
        user="<reserved_102>{content}<reserved_103>", special_tokens=("<reserved_102>", "<reserved_103>")
    ),
    "baichuan2": ChatFormat(
        user="<reserved_106>{content}<reserved_107>", special_tokens=("<reserved_106>", "<reserved_107>")
    ),
    "gemma": ChatFormat(
        opening="<bos>",
        system="{content}\n\n",
        user="<start_of_turn>user\n{system}{content}<end_of_turn>\n<start_of_turn>model\n",
        end="<end_of_turn>",
        trims=("user", "answer"),
        after="\n",
        special_tokens=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    ),
    "vicuna": ChatFormat(
        system="{content} ",
        user="USER: {content} ASSISTANT:",
        answer=" {content}",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
}
CHAT_FORMATS |= {
    "qwen2": CHAT_FORMATS["qwen"],
    "mixtral": CHAT_FORMATS["mistral"],
    "gemma2": CHAT_FORMATS["gemma"],
    "gemma3": CHAT_FORMATS["gemma"],
}


class NamedTemplate:
    """A template out of `CHAT_FORMATS`.

    Args:
        name: Its key.
        tokens: Names of the tokenizer's special tokens; where the format writes one as text, such as ``[INST]``,
            it is that token.
    """

    def __init__(self, name: str, tokens: Sequence[str] = ()):
        self._tokens = tuple(tokens)
        chat = CHAT_FORMATS[name]
        self.name = name
        self.special_tokens = chat.special_tokens
        self.appends_eos = not (chat.end or chat.ends_with_next)
        self._ends_with_next = chat.ends_with_next
        self._trims, self._tools = chat.trims, chat.tools
        self._default_system = chat.default_system
        self._opening = self._parse(chat.opening)
        self._system = self._parse(chat.system)
        self._user = self._parse(chat.user)
        self._only_user = self._user if chat.only_user is None else self._parse(chat.only_user)
        self._first_round = chat.first_round
        self._tool = self._parse(chat.tool if chat.tool is not None else chat.user)
        self._answer = self._parse(chat.answer + chat.end)
        self._after = self._parse(chat.after)
        self._system_in_user = Slot("data", "system") in self._user

    def render(self, conversation: Conversation) -> list[Piece]:
        """Every message, the answers learned."""
        writer = self._write(conversation, len(conversation.messages) - 1)
        last = conversation.messages[-1]
        self._write_answer(writer, last)
        if self._ends_with_next:
            self._fill(writer, (self._tool if last.role == TOOL_CALL else self._user)[:1], {}, learned=True)
        return writer.finish()

    def render_prompt(self, conversation: Conversation) -> list[Piece]:
        """What stands before the last answer."""
        return self._write(conversation, len(conversation.messages) - 1).finish()

    def _parse(self, pattern: str) -> tuple[Slot, ...]:
        names = tuple(dict.fromkeys((*self.special_tokens, *self._tokens)))
        return parse_pattern(pattern, ("content", "round", "system"), names)

    def _write(self, conversation: Conversation, num_messages: int) -> PieceWriter:
        writer = PieceWriter()
        self._fill(writer, self._opening, {})
        functions = self._tools.describe(conversation.tools) if self._tools and conversation.tools else None
        if functions is not None:
            self._fill(writer, self._system, {"content": functions})
            conversation = replace(conversation, tools=None)
        system = self._trimmed("system", conversation.system_text(self._default_system))
        if system and not self._system_in_user:
            self._fill(writer, self._system, {"content": system})
        is_single = sum(message.role in (USER, TOOL) for message in conversation.messages[:num_messages]) == 1
        user = self._only_user if is_single else self._user
        round_number = self._first_round - 1
        for place, message in enumerate(conversation.messages[:num_messages]):
            if message.role in (USER, TOOL):
                round_number += message.role == USER
                content = self._trimmed("user", message.content)
                values = {"content": content, "round": str(round_number), "system": system}
                slots = user if message.role == USER else self._tool
                if self._ends_with_next and place > 0:
                    self._fill(writer, slots[:1], values, learned=True)
                    slots = slots[1:]
                self._fill(writer, slots, values)
                system = ""
            else:
                self._write_answer(writer, message)
                self._fill(writer, self._after, {})
        return writer

    def _write_answer(self, writer: PieceWriter, message: Message) -> None:
        text = self._trimmed("answer", message.content)
        if self._tools is None or message.role != TOOL_CALL:
            self._fill(writer, self._answer, {"content": text}, learned=True)
            return
        text, calls = self._tools.write_calls(text)
        if text or not calls:
            self._fill(writer, self._answer, {"content": text}, learned=True)
        for place, call in enumerate(calls):
            if text or place:
                writer.write("special", self._tools.opening, learned=True)
            writer.write("data", call, learned=True)

    def _trimmed(self, whose: str, text: str) -> str:
        return text.strip() if whose in self._trims else text

    def _fill(
        self, writer: PieceWriter, slots: tuple[Slot, ...], values: dict[str, str], *, learned: bool = False
    ) -> None:
        for kind, value in slots:
            if kind != "data":
                writer.write(kind, value, learned=learned)
            elif value != "system":
                writer.write(kind, values[value], learned=learned)
            elif values["system"]:
                self._fill(writer, self._system, {"content": values["system"]})
