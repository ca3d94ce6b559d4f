"""Formats of published models as jinja text: what the publishers' own texts write, and what is learned of it."""

from __future__ import annotations

import json

import pytest

from finetune.data.reading.conversation import Conversation, Message, make_conversation
from finetune.data.templates.jinja_environment import CHAT
from finetune.data.templates.jinja_forms import JINJA_FORMS
from finetune.data.templates.pieces import RefusedConversationError, RewrittenConversationError
from finetune.data.templates.template import asks_for_time, load_template
from finetune.data.templates.template_clock import set_day
from finetune.data.templates.template_rendering import Renderer, RenderError
from finetune.data.templates.trained_template import carry_template, template_source, trained_thinking
from finetune.errors import UserError
from finetune.families.family import get_family
from tests.data.test_chat_templates import show
from tests.reference.published_templates import DAY, GOLDEN, TOKENS, TOOLS, variants

PUBLISHED = json.loads(GOLDEN.read_text("utf-8"))
TWO_ROUNDS = make_conversation([("q1", "a1"), ("q2", "a2")])
SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
ASKED = "§<|im_start|>user\n{}§<|im_end|>\n§<|im_start|>assistant\n"
TOKEN_FILE = {"bos_token": "<s>", "eos_token": "</s>"}


def render(name, values):
    source = JINJA_FORMS[name].source
    try:
        return Renderer(source, name, CHAT).render({"date_string": DAY, **values, **TOKENS})
    except RenderError:
        return None


def written_differently(name, label, values):
    """What is meant to differ: where the publisher's text cannot be learned from, as docs/data.md says."""
    roles = [message["role"] for message in values["messages"]]
    if name == "deepseek_r1":  # the last answer has its thoughts, and functions are refused
        return roles[-1] == "assistant" or "tool" in roles
    # The publisher leaves the system text out unless the last message is a question.
    return name.startswith("mistral") and roles[0] == "system" and roles[-1] == "assistant"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_texts_are_the_published_ones(name):
    num_equal = 0
    for label, values in variants():
        if label in PUBLISHED[name] and not written_differently(name, label, values):
            assert render(name, values) == PUBLISHED[name][label], label
            num_equal += 1
    assert num_equal >= 7


def test_what_a_text_differs_in_makes_it_learnable():
    thoughts = next(values for label, values in variants() if label == "thoughts apart")
    assert render("deepseek_r1", thoughts) == (
        "<s><｜User｜>q<｜Assistant｜>a1<｜end▁of▁sentence｜>"
        "<｜User｜>q2<｜Assistant｜><think>\nt2\n</think>\n\na2<｜end▁of▁sentence｜>"
    )
    rounds = next(values for label, values in variants() if label == "system, two rounds")
    assert render("mistral_nemo", rounds) == "<s>[INST]q[/INST]a</s>[INST]sys\n\nq2[/INST]a2</s>"
    called = next(values for label, values in variants() if label == "called, tools")
    assert render("deepseek_r1", called) is None


# name: (one round without a system text, its prompt)
ONE_ROUND = {
    "qwen2.5": "§<|im_start|>system\n" + QWEN + "§<|im_end|>\n" + ASKED + "{a}{§<|im_end|>}",
    "qwen3": ASKED + "{<think>\n\n</think>\n\na}{§<|im_end|>}",
    "qwen3_nothink": ASKED + "{a}{§<|im_end|>}",
    "qwen3_thinking": ASKED + "<think>\n{\n</think>\n\na}{§<|im_end|>}",
    "qwq": ASKED + "<think>\n{\n</think>\n\na}{§<|im_end|>}",
    "deepseek_r1": "§<s>§<｜User｜>q§<｜Assistant｜><think>\n{\n</think>\n\na}{§<｜end▁of▁sentence｜>}",
    "llama3.1": (
        "§<s>§<|start_header_id|>system§<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n§<|eot_id|>§<|start_header_id|>user§<|end_header_id|>\n\nq§<|eot_id|>"
        "§<|start_header_id|>assistant§<|end_header_id|>\n\n{a}{§<|eot_id|>}"
    ),
    "mistral_v3": "§<s>§[INST] q§[/INST]{ a}{§</s>}",
    "mistral_nemo": "§<s>§[INST]q§[/INST]{a}{§</s>}",
    "skywork": "§<s>§</s>§<s>[USER]q[SEP][BOT]{a[SEP]}{§</s>}",
}
ONE_ROUND["llama3.3"] = ONE_ROUND["llama3.1"]
ONE_ROUND["llama3.2"] = ONE_ROUND["llama3.1"].replace("26 Jul 2024", "05 Mar 2026")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKEN_FILE))
    return tmp_path


@pytest.fixture
def day():
    set_day("2026-03-05")
    yield
    set_day(None)


def test_every_format_is_written_out_here():
    assert set(ONE_ROUND) == set(JINJA_FORMS)


@pytest.mark.parametrize("name", ONE_ROUND)
def test_learned_is_the_answer_with_its_end(name, folder, day):
    template = load_template(name, folder)
    conversation = make_conversation([("q", "a")])
    expected = ONE_ROUND[name].replace(ASKED, ASKED.replace("{}", "q"))
    assert show(template.render(conversation)).removesuffix("\n") == expected
    assert show(template.render_prompt(conversation)) == expected.partition("{")[0]
    assert template.special_tokens == JINJA_FORMS[name].special_tokens and not template.appends_eos
    assert asks_for_time(name, folder) == (name == "llama3.2")


def asked(text, name="q"):
    return ASKED.replace("{}", name) + text


@pytest.mark.parametrize(
    ("switch", "prompt", "learned"),
    [
        (None, "", "{<think>\n\n</think>\n\na}{§<|im_end|>}"),
        (True, "", "{<think>\n\n</think>\n\na}{§<|im_end|>}"),
        (False, "<think>\n\n</think>\n\n", "{a}{§<|im_end|>}"),
    ],
)
def test_without_thoughts_the_switch_says_whether_their_place_is_learned(switch, prompt, learned, folder):
    template = load_template("qwen3", folder, enable_thinking=switch)
    conversation = make_conversation([("q /no_think", "a")])
    assert show(template.render(conversation)).rstrip() == asked(prompt + learned, "q /no_think")
    assert show(template.render_prompt(conversation)) == asked(prompt, "q /no_think")


@pytest.mark.parametrize(
    "message",
    [
        Message("assistant", "a", reasoning="because"),
        Message("assistant", "<think>\nbecause\n</think>\n\na"),
    ],
)
def test_thoughts_are_learned_and_cannot_be_with_the_switch_off(message, folder):
    conversation = Conversation((Message("user", "q"), message))
    for switch in (None, True):
        template = load_template("qwen3", folder, enable_thinking=switch)
        written = show(template.render(conversation)).rstrip()
        assert written == asked("{<think>\nbecause\n</think>\n\na}{§<|im_end|>}")
    template = load_template("qwen3", folder, enable_thinking=False)
    with pytest.raises(RefusedConversationError, match="it holds thoughts, and enable_thinking is false"):
        template.render_last(conversation)


@pytest.mark.parametrize("name", ["deepseek_r1", "qwen3_thinking", "qwq"])
@pytest.mark.parametrize("text", ["<think>\nbecause\n</think>\n\na", "<think>because</think>a"])
def test_thoughts_in_texts_are_learned_behind_a_prompt_that_opens_them(name, text, folder):
    """Data of distilled models hold them so, with the opening that the prompt has, too."""
    apart = Conversation((Message("user", "q"), Message("assistant", "a", reasoning="because")))
    template = load_template(name, folder)
    written = show(template.render(make_conversation([("q", text)])))
    assert written == show(template.render(apart))
    assert "<think>\n{because\n</think>\n\na}" in written
    two_rounds = make_conversation([("q", text), ("q2", text)])
    assert show(template.render_last(two_rounds)).count("because") == 1


def test_earlier_answers_lose_their_thoughts(folder):
    messages = (
        Message("user", "q1"),
        Message("assistant", "a1", reasoning="t1"),
        Message("user", "q2"),
        Message("assistant", "a2", reasoning="t2"),
    )
    template = load_template("qwen3", folder)
    with pytest.raises(RewrittenConversationError):
        template.render(Conversation(messages))
    before = asked("a1§<|im_end|>\n", "q1") + asked("", "q2")
    last = template.render_last(Conversation(messages))
    assert show(last).rstrip() == before + "{<think>\nt2\n</think>\n\na2}{§<|im_end|>}"
    assert show(template.render_prompt(Conversation(messages))) == before
    off = load_template("qwen3", folder, enable_thinking=False)
    assert show(off.render_prompt(Conversation(messages))) == before + "<think>\n\n</think>\n\n"


def test_functions_and_their_calls_are_written_from_objects(folder):
    text = '{"name": "weather", "arguments": {"city": "北京"}}'
    messages = (
        Message("user", "w?"),
        Message("tool_call", text),
        Message("tool", "21"),
        Message("assistant", "warm"),
    )
    conversation = Conversation(messages, tools=json.dumps(TOOLS, ensure_ascii=False))
    template = load_template("qwen2.5", folder)
    written = show(template.render(conversation))
    assert "{<tool_call>\n" + text + "\n</tool_call>}{§<|im_end|>}" in written
    assert "§<|im_start|>user\n<tool_response>\n21\n</tool_response>§<|im_end|>" in written
    whole = "".join(piece.text for piece in template.render(conversation))
    assert whole == PUBLISHED["qwen2.5"]["called, answered, tools"]
    assert show(load_template("qwen3", folder).render_last(conversation)).endswith(
        "§<|im_start|>assistant\n{<think>\n\n</think>\n\nwarm}{§<|im_end|>}\n"
    )


def test_a_switch_without_a_place_is_refused(folder):
    for name in ("qwen2.5", "chatml", "none", "llama3.1"):
        with pytest.raises(
            UserError, match=f"enable_thinking is set, but the chat template '{name}' has no place"
        ):
            load_template(name, folder, enable_thinking=True)


def test_what_was_trained_travels_with_the_switch(folder):
    run, merged = folder / "run", folder / "merged"
    for each in (run, merged):
        each.mkdir()
    note = {"chat_template": "qwen3", "enable_thinking": False, "system": "sys"}
    (run / "arguments.json").write_text(json.dumps(note))
    assert carry_template([run], merged) == "qwen3" and trained_thinking(merged) is False
    source = template_source(merged, get_family("qwen3").tokenizer)
    values = {"messages": [{"role": "user", "content": "q"}], "add_generation_prompt": True}
    written = Renderer(source, "t", CHAT).render(values)
    assert written == SYSTEM.format("sys") + asked("<think>\n\n</think>\n\n").replace("§", "")
    told = Renderer(source, "t", CHAT).render({**values, "enable_thinking": True})
    assert told == written.removesuffix("<think>\n\n</think>\n\n")


def test_near_names_are_told(folder):
    with pytest.raises(UserError, match=r"'qwen-3' is not known \(did you mean 'qwen3'.*qwen3_nothink"):
        load_template("qwen-3", folder)
