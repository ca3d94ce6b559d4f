"""Label masks decoded back to text: for every format, template and odd turn, exactly these characters carry loss.

What is learned stands in guillemets; <EOS> is the tokenizer's own end. The frames are written out here, apart from
the templates that are tested.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from finetune.data.reading.formats import read_conversations
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.template import JsonTemplate, load_template

SPECIAL = ["<EOS>", "<s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>",
           "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<reserved_102>", "<reserved_103>",
           "<reserved_106>", "<reserved_107>", "</s>"]  # fmt: skip


class Encoder:
    """One id for a character, and one for a special token where a template writes it."""

    eos_token_id, pad_token_id, prefix_ids = 0, 0, ()

    def encode(self, text):
        return [100 + ord(character) for character in text]

    def encode_special(self, text):
        parts = re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text)
        return [
            i for part in parts for i in ([SPECIAL.index(part)] if part in SPECIAL else self.encode(part))
        ]

    def decode(self, ids):
        return "".join(SPECIAL[i] if i < 100 else chr(i - 100) for i in ids)


class Frame(NamedTuple):
    """How a template writes; %s is the text, the answer's frame holds the marks."""

    user: str
    answer: str = "«%s<EOS>»"
    after: str = ""
    system: str = "%s"
    opening: str = ""
    default_system: str = ""
    system_in_user: bool = False  # %S in the user's frame
    tool: str = ""


CHATML = Frame(
    "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n", "«%s<|im_end|>»", "\n",
    "<|im_start|>system\n%s<|im_end|>\n", tool="<|im_start|>tool\n%s<|im_end|>\n<|im_start|>assistant\n",
)  # fmt: skip
HEAD, ASKS = (
    "<|start_header_id|>{}<|end_header_id|>\n\n%s<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
)
FRAMES = {
    "plain": Frame("%s"),
    "llama2": Frame("<s>[INST] %S%s [/INST]", "« %s <EOS>»", system="<<SYS>>\n%s\n<</SYS>>\n\n", system_in_user=True),
    "llama3": Frame(HEAD.format("user") + ASKS, "«%s<|eot_id|>»", system=HEAD.format("system"),
                    opening="<|begin_of_text|>", tool=HEAD.format("ipython") + ASKS),
    "mistral": Frame("[INST] %S%s [/INST]", "« %s<EOS>»", system="%s\n\n", opening="<s>", system_in_user=True),
    "chatml": CHATML,
    "qwen": CHATML._replace(default_system="You are a helpful assistant."),
    "chatglm2": Frame("[Round %R]\n\n问：%s\n\n答：", "«%s<EOS>»", "\n\n", "%s\n\n"),
    "alpaca": Frame("### Instruction:\n%s\n\n### Response:\n", "«%s<EOS>»", "\n\n", "%s\n\n",
                    default_system="Below is an instruction that describes a task. Write a response that appropriately "
                    "completes the request."),
    "baichuan": Frame("<reserved_102>%s<reserved_103>"),
    "baichuan2": Frame("<reserved_106>%s<reserved_107>"),
    "gemma": Frame("<start_of_turn>user\n%S%s<end_of_turn>\n<start_of_turn>model\n", "«%s<end_of_turn>»", "\n",
                   "%s\n\n", "<bos>", system_in_user=True),
    "vicuna": Frame("USER: %s ASSISTANT:", "« %s<EOS>»", system="%s ",
                    default_system="A chat between a curious user and an artificial intelligence assistant. The "
                    "assistant gives helpful, detailed, and polite answers to the user's questions."),
    "jinja": Frame("<s>user:%s</s>", "«<s>assistant:%s</s>»", system="<s>system:%s</s>", tool="<s>tool:%s</s>"),
    "jinja that trims": Frame("<s>user:%s</s><s>assistant:", "«%s</s>»", system="<s>system:%s</s>",
                              tool="<s>tool:%s</s><s>assistant:"),
    "jinja that marks": Frame("Q %s A ", "«%s</s>»", system="S %s ", tool="T %s A "),
    "paddlenlp json": Frame("<s>%s\n", "«%s</s>»", system="[%s]"),
}  # fmt: skip
JINJA = {
    "jinja": "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}",
    "jinja that trims": "{% for m in messages %}<s>{{ m.role }}:{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}",
    "jinja that marks": "{% for m in messages %}{% if m.role == 'assistant' %}A {% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ {'user': 'Q', 'system': 'S', 'tool': 'T'}[m.role] }} {{ m.content }} {% endif %}"
    "{% endfor %}",
}
JSON = {
    "system": "{% if system %}[{{ system }}]{% endif %}",
    "conversation": ["<s>{{user}}\n", "{{bot}}</s>"],
}


def make_template(name):
    if name in JINJA:
        return JinjaTemplate(JINJA[name], name, {"bos_token": "<s>", "eos_token": "</s>"})
    return JsonTemplate(JSON, name) if name == "paddlenlp json" else load_template(name)


def expect(name, turns):
    """The text for turns in order: U, S, T and A, or N for an answer that is not learned, and its text."""
    frame = FRAMES[name]
    system = next((text for kind, text in turns if kind == "S"), frame.default_system)
    first = frame.system.replace("%s", system) if system else ""
    text, rounds = frame.opening + ("" if frame.system_in_user else first), 0
    for kind, content in turns:
        if kind in "UT":
            rounds += kind == "U"
            pattern = frame.tool if kind == "T" and frame.tool else frame.user
            text += pattern.replace("%S", first).replace("%R", str(rounds)).replace("%s", content)
            first = ""
        elif kind in "AN":
            learned = frame.answer.replace("%s", content)
            if learned == "«<EOS>»" and name != "plain":
                learned = ""  # nothing is written that an end could close
            text += (learned if kind == "A" else re.sub("[«»]", "", learned)) + frame.after
    # No label depends on what stands behind the last learned character.
    return text[: text.rindex("»") + 1].replace("»«", "")


def show(file, name):
    """The first sample of a file, its learned characters marked."""
    conversations = read_conversations([file])
    builder = BulkBuilder(Encoder(), make_template(name), src_length=5000, max_length=5000)
    (sample,) = builder.build(conversations, lambda *dropped: pytest.fail(str(dropped)))
    ids = [*sample.input_ids.tolist(), int(sample.labels[-1])]
    learned = [False, *(label != IGNORE_INDEX for label in sample.labels.tolist())]
    assert all(
        label in (IGNORE_INDEX, following) for label, following in zip(sample.labels, ids[1:], strict=True)
    )
    text = ""
    for index, is_learned in zip(ids, learned, strict=True):
        text += f"«{Encoder().decode([index])}»" if is_learned else Encoder().decode([index])
    return text.replace("»«", "")


ROLES = {"U": ("user", "human"), "A": ("assistant", "gpt"), "N": ("assistant", "gpt"), "S": ("system", "system"),
         "T": ("tool", "observation"), "C": ("tool_call", "function_call")}  # fmt: skip


def as_messages(turns):
    written = []
    for kind, text in turns:
        message = {"role": ROLES[kind][0], "content": text}
        written.append(message | ({"loss": False} if kind == "N" else {}))
    return {"messages": written}


def as_sharegpt(turns):
    written = []
    for kind, text in turns:
        message = {"from": ROLES[kind][1], "value": text}
        written.append(message | ({"weight": 0} if kind == "N" else {}))
    return {"conversations": written}


def as_pairs(turns):
    system = dict([("system", text) for kind, text in turns if kind == "S"])
    texts = [text for kind, text in turns if kind in "UA"]
    return system, list(zip(texts[0::2], texts[1::2], strict=True))


def as_history(turns):
    system, pairs = as_pairs(turns)
    return {"query": pairs[-1][0], "response": pairs[-1][1], "history": pairs[:-1]} | system


def as_alpaca(turns):
    system, pairs = as_pairs(turns)
    prompt, answer = pairs[-1]
    return {"instruction": prompt, "input": "", "output": answer, "history": pairs[:-1]} | system


def as_lists(turns):
    system, pairs = as_pairs(turns)
    return {"src": [prompt for prompt, _ in pairs], "tgt": [answer for _, answer in pairs]} | system


FORMATS = {"messages": as_messages, "sharegpt": as_sharegpt, "history": as_history, "alpaca": as_alpaca,
           "src_tgt": as_lists}  # fmt: skip
REGULAR = [
    [("U", "q"), ("A", "a")],
    [("U", "q1"), ("A", "a1"), ("U", "q2"), ("A", "a2")],
    [("S", "be kind"), ("U", "q1"), ("A", "a1"), ("U", "q2"), ("A", "a2")],
    [("U", "<EOS>«"), ("A", "</s> 你好 <|im_end|> {{ x }}")],
]


def clean(turns):
    """Guillemets stand for marks here, and not for themselves."""
    return [(kind, text.replace("«", "")) for kind, text in turns]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FRAMES)
def test_every_format_in_every_template(write_lines, name, form):
    for turns in map(clean, REGULAR):
        assert show(write_lines(FORMATS[form](turns)), name) == expect(name, turns)


# What stands in the file, and what it means.
ODD = {
    "two prompts": ("U:p U:q A:a", "U:p\nq A:a"),
    "two answers": ("U:q A:a A:b", "U:q A:a\nb"),
    "answer first": ("A:x U:q A:a", "U:q A:a"),
    "prompt last": ("U:q A:a U:p", "U:q A:a"),
    "system inside": ("U:q A:a S:s U:p A:b", "U:q A:a U:s\np A:b"),
    "two systems": ("S:s S:t U:q A:a", "S:s\nt U:q A:a"),
    "system last": ("U:q A:a S:s", "U:q A:a"),
    "empty answer inside": ("U:q A: U:p A:b", "U:q N: U:p A:b"),
    "first not learned": ("U:q N:a U:p A:b", "U:q N:a U:p A:b"),
    "last not learned": ("U:q A:a U:p N:b", "U:q A:a U:p N:b"),
    "tool": ("U:q C:c T:r A:a", "U:q A:c T:r A:a"),
    "two results": ("U:q C:c T:r T:s A:a", "U:q A:c T:r\ns A:a"),
    "call not learned": ("S:s U:q N:c T:r A:a", "S:s U:q N:c T:r A:a"),
}


def parse(text):
    return [tuple(turn.split(":", 1)) for turn in text.split(" ")]


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("odd", ODD)
def test_odd_turns_in_every_template(write_lines, odd, name, form):
    written, meant = map(parse, ODD[odd])
    assert show(write_lines(FORMATS[form](written)), name) == expect(name, meant)


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize(
    "record", [{"text": "abc"}, {"query": None, "response": "abc"}, {"src": "", "tgt": "abc"}]
)
def test_text_is_learned_whole_and_without_a_template(write_lines, record, name):
    assert show(write_lines(record), name) == "a«bc<EOS>»"  # nothing stands before the first character
