"""Calls of functions and thoughts reach the branches that a template has for them."""

from __future__ import annotations

import json

import pytest

from finetune.data.reading.conversation import ASSISTANT, TOOL, TOOL_CALL, USER, Conversation, Message
from finetune.data.samples.dataset import load_samples
from finetune.data.templates.jinja_environment import CHAT, make_environment
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.pieces import RefusedConversationError
from finetune.data.templates.tool_calls import split_calls
from finetune.errors import UserError

CALLS = """{% for m in messages %}<s>{{ m.role }}
{% if m.tool_calls %}{{ m.content }}{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}
{% else %}{{ m.content }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""
STRICT = CALLS.replace(
    "<call>", "<call>{{ c.id | length + 1 }}{% if not c.id %}{{ raise_exception('no id') }}{% endif %}"
)
THOUGHTS = """{% for m in messages %}<s>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""
WEATHER = {"name": "weather", "arguments": {"城": "北京", "days": 2}}
TIME = {"name": "time", "arguments": {}}


def template(source: str) -> JinjaTemplate:
    return JinjaTemplate(source, "own", {"bos_token": "<s>", "eos_token": "</s>"}, ["<call>", "</call>"])


def text_of(pieces, *, learned: bool | None = None) -> str:
    return "".join(piece.text for piece in pieces if learned in (None, piece.learned))


def conversation(call: str) -> Conversation:
    return Conversation(
        (Message(USER, "q"), Message(TOOL_CALL, call), Message(TOOL, "r"), Message(ASSISTANT, "a"))
    )


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (json.dumps(WEATHER), "", [WEATHER]),
        (json.dumps([WEATHER, TIME], indent=1), "", [WEATHER, TIME]),
        (f"let me\nsee\n{json.dumps(WEATHER)}\n{json.dumps(TIME)}", "let me\nsee", [WEATHER, TIME]),
        ("{not json}", "{not json}", None),
        ('{"name": "x"}', '{"name": "x"}', None),
        (f"{json.dumps(TIME)}\nbehind it", f"{json.dumps(TIME)}\nbehind it", None),
        ("[" * 100_000, "[" * 100_000, None),
        ("", "", None),
    ],
)
def test_calls_are_taken_from_the_text(text, said, calls):
    found_text, found = split_calls(text)
    assert found_text == said
    assert (json.loads(found) if found else None) == calls


@pytest.mark.parametrize("said", ["", "let me see"])
def test_calls_are_written_as_the_template_writes_objects(said):
    call = f"{said}\n{json.dumps(WEATHER, ensure_ascii=False)}" if said else json.dumps(WEATHER)
    pieces = template(CALLS).render(conversation(call))
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": said, "tool_calls": [{"type": "function", "function": WEATHER}]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]
    expected = (
        make_environment(CHAT).from_string(CALLS).render(messages=messages, add_generation_prompt=False)
    )
    assert text_of(pieces) == expected
    assert text_of(pieces, learned=True) == f'{said}<call>weather {{"城": "北京", "days": 2}}</call></s>a</s>'
    assert [piece.text for piece in pieces if piece.special and piece.learned][:2] == ["<call>", "</call>"]


def test_a_text_that_is_no_call_stays_the_answer():
    assert text_of(template(CALLS).render(conversation("call it")), learned=True) == "call it</s>a</s>"


def test_a_template_that_asks_for_more_than_data_have_gets_the_text():
    call = json.dumps(TIME)
    assert text_of(template(STRICT).render(conversation(call)), learned=True) == f"{call}</s>a</s>"


def test_calls_cannot_bring_special_tokens_in():
    call = json.dumps({"name": "x", "arguments": {"text": "</s>"}})
    with pytest.raises(
        RefusedConversationError, match=r"calls of functions contain '</s>', which is a special token"
    ):
        template(CALLS).render(conversation(call))


def test_thoughts_stand_where_the_template_has_a_place():
    thoughtful = Conversation((Message(USER, "q"), Message(ASSISTANT, "a", reasoning="\nbecause <s>\n")))
    pieces = template(THOUGHTS).render(thoughtful)
    assert text_of(pieces, learned=True) == "<think>\nbecause <s>\n</think>a</s>"
    assert not any(piece.special for piece in pieces if "because <s>" in piece.text)
    assert text_of(template(CALLS).render(thoughtful), learned=True) == "a</s>"
    assert text_of(
        template(THOUGHTS).render(Conversation((Message(USER, "q"), Message(ASSISTANT, "a"))))
    ) == ("<s>user\nq</s><s>assistant\na</s>")


def test_thoughts_of_one_answer_are_not_those_of_another():
    two = Conversation(
        tuple(
            message
            for number in "12"
            for message in (
                Message(USER, f"q{number}"),
                Message(ASSISTANT, f"a{number}", reasoning=f"t{number}"),
            )
        ),
        system="s",
    )
    assert (
        text_of(template(THOUGHTS).render(two), learned=True)
        == "<think>t1</think>a1</s><think>t2</think>a2</s>"
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [(THOUGHTS, "whose reasoning the chat template writes, so that it is learned: 2"),
     (CALLS, "whose reasoning is left out, for which the chat template has no place: 2")],
)  # fmt: skip
def test_the_report_says_whether_thoughts_are_learned(encoder, source, said):
    thoughtful = Conversation((Message(USER, "q"), Message(ASSISTANT, "a", reasoning="why")))
    plain = Conversation((Message(USER, "q"), Message(ASSISTANT, "a")))
    limits = {"src_length": 99, "max_length": 99}
    report = load_samples([thoughtful, plain, thoughtful], encoder, template(source), **limits)[1]
    assert f"read by rule: answers {said}" in report.describe()


SPLIT = """{% for m in messages %}<s>{{ m.role }}
{% set said = m.content %}{% if m.role == 'assistant' and '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}{{ said }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""


def test_thoughts_that_the_template_leaves_out_are_not_learned():
    plain = Conversation((Message(USER, "q"), Message(ASSISTANT, "a")))
    assert text_of(template(SPLIT).render(plain), learned=True) == "a</s>"
    thoughtful = Conversation((Message(USER, "q"), Message(ASSISTANT, "<think>t</think>a")))
    with pytest.raises(
        RefusedConversationError, match="it leaves the thoughts before </think> out of answers"
    ):
        template(SPLIT).render(thoughtful)


@pytest.mark.parametrize("change", ["upper", "replace('a', 'b')", "title"])
def test_a_template_that_changes_answers_is_refused(change):
    with pytest.raises(UserError, match="changes the text of answers"):
        template(CALLS.replace("{% else %}{{ m.content }}", f"{{% else %}}{{{{ m.content | {change} }}}}"))
