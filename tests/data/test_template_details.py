"""Jinja templates as people's folders have them, and exactly which characters carry loss.

In the expected texts what is learned stands in guillemets.
"""

from __future__ import annotations

from datetime import datetime

import pytest

from finetune.data.reading.conversation import (
    ASSISTANT,
    TOOL,
    TOOL_CALL,
    USER,
    Conversation,
    Message,
    make_conversation,
)
from finetune.data.samples.tokenize import SampleBuilder
from finetune.data.templates.chat_templates import NamedTemplate
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.template import PlainTemplate
from finetune.data.templates.template_clock import set_day

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ONE = make_conversation([("q", "a")])
TWO = make_conversation([("q1", "a1"), ("q2", "a2")])
WITH_TOOL = Conversation(
    (Message(USER, "q"), Message(TOOL_CALL, "c"), Message(TOOL, "r"), Message(ASSISTANT, "a"))
)
CLOSING_LATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}Q: {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<sys>default</sys>{% endif %}"
    "{% for m in messages %}{% if m.role == 'system' %}<sys>{{ m.content }}</sys>{% else %}"
    "{{ m.role[0] }}:{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def jinja(source):
    return JinjaTemplate(source, "t", TOKENS, ["<|im_start|>", "<|im_end|>"])


def show(template, conversation):
    text = ""
    for piece in template.render(conversation):
        text += f"«{piece.text}»" if piece.learned else piece.text
    return text.replace("»«", "")


@pytest.mark.parametrize(
    ("template", "conversation", "expected"),
    [
        (PlainTemplate(), ONE, "q«a»"),
        (PlainTemplate(), TWO, "q1«a1»q2«a2»"),
        (PlainTemplate(), WITH_TOOL, "q«c»r«a»"),
        (NamedTemplate("llama2"), TWO, "<s>[INST] q1 [/INST]« a1 »<s>[INST] q2 [/INST]« a2 »"),
        (NamedTemplate("mistral"), TWO, "<s>[INST] q1 [/INST]« a1»[INST] q2 [/INST]« a2»"),
        (NamedTemplate("vicuna"), make_conversation([("q", "a")], ""), "USER: q ASSISTANT:« a»"),
        (NamedTemplate("alpaca"), make_conversation([("q", "a")], "s"),
         "s\n\n### Instruction:\nq\n\n### Response:\n«a»"),
        (NamedTemplate("chatglm2"), TWO,
         "[Round 1]\n\n问：q1\n\n答：«a1»\n\n[Round 2]\n\n问：q2\n\n答：«a2»"),
        (NamedTemplate("chatml"), WITH_TOOL,
         "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n«c<|im_end|>»\n"
         "<|im_start|>tool\nr<|im_end|>\n<|im_start|>assistant\n«a<|im_end|>»"),
        (NamedTemplate("gemma"), make_conversation([("q", "a")], "s"),
         "<bos><start_of_turn>user\ns\n\nq<end_of_turn>\n<start_of_turn>model\n«a<end_of_turn>»"),
        (jinja(CLOSING_LATE), TWO,
         "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n«a1<|im_end|>»\n"
         "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n«a2<|im_end|>»"),
        (jinja(MARKED), TWO, "Q: q1 A: «a1</s>»Q: q2 A: «a2</s>»"),
        (jinja(DEFAULT_SYSTEM), ONE, "<sys>default</sys>u:q</s>a:«a</s>»"),
        (jinja(DEFAULT_SYSTEM), make_conversation([("q", "a")], ""), "<sys></sys>u:q</s>a:«a</s>»"),
        (jinja(DEFAULT_SYSTEM), make_conversation([("q", "a")], "s"), "<sys>s</sys>u:q</s>a:«a</s>»"),
    ],
)  # fmt: skip
def test_which_characters_carry_loss(template, conversation, expected):
    assert show(template, conversation) == expected


@pytest.mark.parametrize("source", [CLOSING_LATE, MARKED])
def test_a_template_with_an_end_mark_gets_no_other(source):
    assert not jinja(source).appends_eos


def test_a_prompt_of_a_marked_template_has_no_marks():
    text = "".join(piece.text for piece in jinja(MARKED).render_prompt(TWO))
    assert text == "Q: q1 A: a1</s>Q: q2 A: "


def test_additions_of_transformers():
    template = jinja(
        "{{ strftime_now('%Y') }}{{ {'词': [1]} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
        "{{ {'词': 1} | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    expected = f'{datetime.now():%Y}{{"\\u8bcd":[1]}}{{"词": 1}}q«a»'
    assert show(template, ONE) == expected


def test_the_date_is_that_of_the_run():
    template = jinja("{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    set_day("2024-02-29")
    try:
        assert show(template, ONE) == "29 Feb 2024q«a»"
    finally:
        set_day(None)
    assert show(template, TWO) == f"{datetime.now():%d %b %Y}q1«a1»q2«a2»"


class Words:
    """Knows one special token; every other character is an id."""

    eos_token_id, pad_token_id, prefix_ids = 0, 0, ()
    marks_inner_text = False

    def __init__(self, **flags):
        self.flags = flags

    def encode(self, text, *, inner=False):
        return [ord(character) for character in text]

    def encode_special(self, text):
        return [1] if text == "<|t|>" else self.encode(text)

    def decode(self, ids):
        return "".join(map(chr, ids))

    def blanks_beside(self, name):
        return (self.flags.get("lstrip", False), self.flags.get("rstrip", False))


def ids_of(template, encoder):
    builder = SampleBuilder(encoder, template, src_length=100, max_length=100)
    parts = builder.cut(ONE, builder.render(ONE))[0].parts
    return [[int(index) for index in ids] for ids, _ in parts]


def test_text_is_not_cut_at_names_that_are_no_tokens():
    template = JinjaTemplate("{% for m in messages %}x <|no|> {{ m.content }}<|t|>{% endfor %}", "t", TOKENS)
    texts = ("x <|no|> q", "x <|no|> a")
    assert ids_of(template, Words()) == [part for text in texts for part in ([*map(ord, text)], [1])]


def test_blanks_that_belong_to_a_token_go_with_it():
    template = JinjaTemplate("{% for m in messages %}<|t|>\n{{ m.content }}\n{% endfor %}", "t", TOKENS)
    assert ids_of(template, Words(rstrip=True))[:2] == [[1], [*map(ord, "q\n")]]
    assert ids_of(template, Words(lstrip=True))[:2] == [[1], [*map(ord, "\nq")]]
