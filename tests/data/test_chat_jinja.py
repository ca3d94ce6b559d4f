"""The built-in formats as jinja: the text of transformers is the text of the training."""

from __future__ import annotations

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.data.reading.conversation import make_conversation
from finetune.data.templates.chat_jinja import write_jinja
from finetune.data.templates.chat_templates import CHAT_FORMATS, NamedTemplate
from finetune.families.family import get_family

TURNS = [("q1\n", "a1"), ("q2", "a2")]


def rendered(source: str, messages: list[dict[str, str]]) -> str:
    # transformers' own settings
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(messages=messages, bos_token="<BOS>", eos_token="<EOS>")


@pytest.mark.parametrize("system", [None, "be brief"])
@pytest.mark.parametrize("name", sorted(CHAT_FORMATS))
def test_jinja_writes_what_the_format_writes(name, system):
    template = NamedTemplate(name)
    end = "<EOS>" if template.appends_eos else ""
    pieces = template.render_prompt(make_conversation(TURNS, system))
    learned = [piece.learned for piece in pieces] + [False]
    expected = "".join(
        piece.text + end * (piece.learned and not learned[place + 1]) for place, piece in enumerate(pieces)
    )
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": "q1\n"}, {"role": "assistant", "content": "a1"}]
    source = write_jinja(CHAT_FORMATS[name], get_family("qwen2").tokenizer)
    assert rendered(source, [*messages, {"role": "user", "content": "q2"}]) == expected


def test_what_opens_an_answer_is_written_once():
    first = get_family("chatglm").tokenizer
    source = write_jinja(CHAT_FORMATS["chatglm"], first)
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "q1"), ("assistant", "a1"), ("user", "q2"))
    ]
    expected = "[Round 0]\n问：q1\n答：a1\n[Round 1]\n问：q2\n答：[gMASK]<sop>"
    assert rendered(source, turns) == expected
    assert rendered(source, turns[:1]) == "q1[gMASK]<sop>"
    assert rendered(source, turns[:2]).startswith("q1[gMASK]<sop>a1")


def test_tokens_that_open_every_sequence_are_written_once():
    llama = get_family("llama").tokenizer
    message = [{"role": "user", "content": "q"}]
    assert rendered(write_jinja(CHAT_FORMATS["chatml"], llama), message).startswith("<BOS><|im_start|>user")
    assert rendered(write_jinja(CHAT_FORMATS["llama2"], llama), message).startswith("<s>[INST] q")
    glm = get_family("chatglm2").tokenizer
    assert rendered(write_jinja(CHAT_FORMATS["chatglm2"], glm), message).startswith("[gMASK]sop[Round 1]")
