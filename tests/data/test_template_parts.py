"""Templates of multimodal models that take what messages say as lists of parts are handed such lists."""

from __future__ import annotations

import pytest

from finetune.data.reading.conversation import Conversation, Message
from finetune.data.templates.jinja_environment import CHAT, make_environment
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.template_syntax import takes_parts

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHOOSING = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WALKING = (
    "\n<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message.content %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
ASKING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [("user", "hi there"), ("assistant", "hello, you"), ("user", "so long"), ("assistant", "good bye")]


def rendered(source, texts, *, parts, prompt=False):
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in texts
    ]
    text = (
        make_environment(CHAT)
        .from_string(source)
        .render(messages=messages, add_generation_prompt=prompt, **TOKENS)
    )
    return text.replace("\ue0f6", "").replace("\ue0f7", "")


@pytest.mark.parametrize(("source", "parts"), [(CHOOSING, True), (WALKING, True), (ASKING, False)])
def test_texts_are_those_of_the_template_itself(source, parts):
    template = JinjaTemplate(source, "a template", TOKENS)
    conversation = Conversation([Message(role, text) for role, text in TEXTS])
    assert takes_parts(make_environment(CHAT).parse(source)) is parts
    pieces = template.render(conversation)
    written = "".join(piece.text for piece in pieces).replace("</s>", "")
    assert written.strip() == rendered(source, TEXTS, parts=parts).strip()
    learned = [piece.text for piece in pieces if piece.learned]
    assert [text for text in ("hello, you", "good bye") if any(text in piece for piece in learned)] == [
        "hello, you",
        "good bye",
    ]
    assert not any("hi there" in piece for piece in learned)
    prompt = "".join(piece.text for piece in template.render_prompt(conversation))
    assert prompt == rendered(source, TEXTS[:-1], parts=parts, prompt=True)
