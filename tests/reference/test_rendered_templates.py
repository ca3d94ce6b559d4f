"""Texts of jinja templates equal those that transformers renders: whole conversations, prompts, and what is learned."""

from __future__ import annotations

import importlib.util
import os
import random

import pytest

from finetune.data.reading.conversation import ASSISTANT, USER, Conversation, Message
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.pieces import RefusedConversationError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ WHAT }}<|im_end|>\n{% endfor %}" + ASKS
CHANGES = [
    "m.content", "m.content.strip()", "m.content.lstrip()", "m.content.rstrip()", "m.content | trim",
    "m.content.strip('\\n')", "m.content.replace('\\n\\n', '\\n')", "m.content.split('</think>')[-1]",
    "m.content[:6] if m.role == 'user' else m.content", "m.content | upper if m.role == 'system' else m.content",
    "m.content | tojson if m.role == 'user' else m.content", "m.content if m.content | trim else '(empty)'",
    "m.content.lstrip() if loop.first else m.content.rstrip('\\n')",
]  # fmt: skip
# Thoughts parted off, taken out of earlier rounds, and put before the last answer alone.
THINKING = (
    """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set content, thoughts = m.content, '' %}
    {%- if m.role == 'assistant' %}
        {%- if m.reasoning_content is string %}
            {%- set thoughts = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last and thoughts %}
        {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}"""
    + ASKS
)
ENDING = CHATML.replace("WHAT", "m.content") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
SOURCES = [*(CHATML.replace("WHAT", change) for change in CHANGES), THINKING, ENDING]
PARTS = [
    "q",
    "Hello  World.",
    " ",
    "\n",
    "\n\n",
    "\t",
    "</think>",
    "<think>t",
    "你好",
    "</s>",
    '"x"',
    "{{ x }}",
    "\u3000",
]


def conversations(count):
    """Conversations of one to three rounds whose texts have blanks, names and thoughts in odd places."""
    draw = random.Random(13)
    for _ in range(count):
        texts = ["".join(draw.choices(PARTS, k=draw.randint(0, 4))) for _ in range(7)]
        messages = []
        for number in range(draw.randint(1, 3)):
            thoughts = draw.choice(["", "", "why\n"])
            prompt, answer = texts[2 * number : 2 * number + 2]
            messages += [Message(USER, prompt), Message(ASSISTANT, answer, reasoning=thoughts)]
        yield Conversation(tuple(messages), draw.choice([None, texts[6] or "s"]))


def as_dicts(conversation, source):
    system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
    messages = []
    for message in conversation.messages:
        thoughts = (
            {"reasoning_content": message.reasoning} if message.reasoning and "reasoning" in source else {}
        )
        messages.append({"role": message.role, "content": message.content} | thoughts)
    return system + messages


@pytest.mark.parity
@pytest.mark.skipif(
    not importlib.util.find_spec("transformers") and os.environ.get("FINETUNE_REQUIRE_PARITY") != "1",
    reason="transformers is not installed; make parity installs it",
)
@pytest.mark.parametrize("number", range(len(SOURCES)))
def test_texts_are_those_of_transformers(number):
    from transformers.utils.chat_template_utils import render_jinja_template

    source = SOURCES[number]

    def render(messages, *, asks):
        texts, _ = render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=asks, **TOKENS
        )
        return texts[0]

    template = JinjaTemplate(source, "t", TOKENS, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"])
    num_written = 0
    for conversation in conversations(150):
        messages = as_dicts(conversation, source)
        prompt = "".join(piece.text for piece in template.render_prompt(conversation))
        assert prompt == render(messages[:-1], asks=True)
        try:
            pieces = template.render(conversation)
        except RefusedConversationError:
            continue
        num_written += 1
        assert "".join(piece.text for piece in pieces) == render(messages, asks=False)
        learned = "".join(piece.text for piece in template.render_last(conversation) if piece.learned)
        added = render(messages, asks=False).removeprefix(prompt)
        assert learned.endswith(added if added.endswith("</s>") else added.removesuffix("\n"))
    assert num_written > 40
