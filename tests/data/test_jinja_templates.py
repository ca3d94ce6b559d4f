import json

import pytest

from finetune.data.reading.conversation import Conversation, Message, make_conversation
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.template import JsonTemplate, load_template
from finetune.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<' + messages[0].content + '>>' %}"
    "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TWO_ROUNDS = make_conversation([("q1", "a1"), ("q2", "a2")], "sys")


def show(pieces):
    texts = ["§" * piece.special + piece.text for piece in pieces]
    return "".join(f"{{{t}}}" if piece.learned else t for piece, t in zip(pieces, texts, strict=True))


def test_chatml_is_what_the_named_template_writes():
    template = JinjaTemplate(CHATML, "t", {})
    named = load_template("chatml")
    assert not template.appends_eos
    assert show(template.render(TWO_ROUNDS)) == show(named.render(TWO_ROUNDS)) + "\n"
    assert template.render_prompt(TWO_ROUNDS) == named.render_prompt(TWO_ROUNDS)


def test_template_without_generation_prompt_and_with_trimming():
    template = JinjaTemplate(INST, "t", TOKENS)
    conversation = make_conversation([(" q1\n", "a1 "), ("q2", "a2")], "sys")
    assert show(template.render(conversation)) == (
        "§<s>[INST] <<sys>>q1 [/INST]{ a1 }{§</s>}§<s>[INST] q2 [/INST]{ a2 }{§</s>}"
    )
    assert template.render(conversation)[2].joined


def test_template_without_end_mark_gets_eos():
    template = JinjaTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", "t", {})
    assert template.appends_eos
    assert show(template.render(make_conversation([("q", "a")]))) == "[user]q{[assistant]a}"


def test_texts_of_examples_are_no_special_tokens_and_no_jinja():
    conversation = make_conversation([("<|im_end|>{{ 7*7 }}", "a<|im_start|>{% if %}")])
    pieces = JinjaTemplate(CHATML, "t", {}).render(conversation)
    assert [piece.text for piece in pieces if piece.special] == ["<|im_start|>", "<|im_end|>"] * 2
    assert "user\n<|im_end|>{{ 7*7 }}" in [piece.text for piece in pieces]


MARKS_LAST = (
    "{% for m in messages %}{{ m.role }}:{% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_conversations_whose_earlier_rounds_are_changed_are_refused():
    template = JinjaTemplate(MARKS_LAST, "t", {})
    assert show(template.render(make_conversation([("q", "a")]))) == "user:q\nassistant:{<think>a\n}"
    with pytest.raises(UserError, match=r"it writes earlier messages differently.* Set train_on to each"):
        template.render(TWO_ROUNDS)
    assert (
        show(template.render_prompt(TWO_ROUNDS)) == "system:sys\nuser:q1\nassistant:a1\nuser:q2\nassistant:"
    )
    last = "system:sys\nuser:q1\nassistant:a1\nuser:q2\nassistant:{<think>a2\n}"
    assert show(template.render_last(TWO_ROUNDS)) == last
    assert show(template.render_prompt(TWO_ROUNDS)) == last.partition("{")[0]


def test_the_end_of_all_messages_is_no_change_of_earlier_ones():
    template = JinjaTemplate(
        CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", "t", TOKENS
    )
    text = show(template.render(make_conversation([("q1", "a1"), ("q2", "a2")])))
    assert text == (
        "§<|im_start|>user\nq1§<|im_end|>\n§<|im_start|>assistant\n{a1}{§<|im_end|>}\n"
        "§<|im_start|>user\nq2§<|im_end|>\n§<|im_start|>assistant\n{a2}{§<|im_end|>}{\n}{§</s>}"
    )


def test_generation_prompt_that_the_answer_does_not_continue_is_refused():
    with pytest.raises(UserError, match="writes earlier messages differently"):
        JinjaTemplate(CHATML.replace("assistant\n{% endif %}", "assistant: {% endif %}"), "t", {})


def test_template_that_leaves_answers_out_is_refused():
    source = (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="leaves out or alters the text of a message from assistant"):
        JinjaTemplate(source, "t", {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", r"t: no valid jinja"),
        ("{{ messages.__class__.__mro__ }}", "fails on a trial conversation: .*unsafe"),
        ("{{ raise_exception('no') }}", "fails on a trial conversation: no"),
        ("{{ 1 / 0 }}", "fails on a trial conversation"),
    ],
)
def test_faulty_template(source, message):
    with pytest.raises(UserError, match=message):
        JinjaTemplate(source, "t", {})


def test_failure_on_an_example_names_the_line(tmp_path):
    source = CHATML.replace(
        "{% for",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for",
        1,
    )
    conversation = make_conversation([("q", "a")], "sys", tmp_path / "a.json", 5)
    with pytest.raises(UserError, match=r"t: fails on .*a\.json:5: no system"):
        JinjaTemplate(source, "t", {}).render(conversation)


TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"


def test_tools_go_where_the_template_has_a_place_for_them():
    messages = (
        Message("user", "q"),
        Message("tool_call", "c"),
        Message("tool", "r"),
        Message("assistant", "a"),
    )
    conversation = Conversation(messages, tools='[{"name": "天气"}]')
    text = show(JinjaTemplate(TOOLS + CHATML, "t", {}).render(conversation))
    assert text.startswith('{"name": "天气"}\n§<|im_start|>user\nq')
    assert "assistant\n{c}{§<|im_end|>}\n§<|im_start|>tool\nr§<|im_end|>" in text
    text = show(JinjaTemplate(CHATML, "t", {}).render(conversation))
    assert 'arguments.\n[{"name": "天气"}]' in text.split("§<|im_end|>")[0]


def test_tools_cannot_write_special_tokens():
    conversation = Conversation((Message("user", "q"), Message("assistant", "a")), tools='["<|im_end|>"]')
    with pytest.raises(UserError, match=r"contain '<\|im_end\|>', which is a special token"):
        JinjaTemplate(TOOLS + CHATML, "t", {}).render(conversation)


# --- where templates are found ---


def write(folder, name, content):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_tokenizers_own_template(tmp_path):
    config = {"chat_template": INST, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    write(tmp_path, "tokenizer_config.json", config)
    assert "§<s>[INST]" in show(load_template("tokenizer", tmp_path).render(TWO_ROUNDS))
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert "§<|im_start|>" in show(load_template("tokenizer", tmp_path).render(TWO_ROUNDS))
    write(tmp_path, "chat_template.json", {"conversation": ["{{user}}", "{{bot}}"]})
    assert isinstance(load_template("tokenizer", tmp_path), JsonTemplate)


def test_jinja_file_takes_special_tokens_from_the_tokenizer(tmp_path):
    write(tmp_path, "mine.jinja", INST)
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<B>", "eos_token": "<E>"})
    assert show(load_template(tmp_path / "mine.jinja", tmp_path).render_prompt(TWO_ROUNDS)).startswith(
        "§<B>[INST]"
    )


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}])
def test_tokenizer_without_a_template(tmp_path, config):
    if config is not None:
        write(tmp_path, "tokenizer_config.json", config)
    with pytest.raises(
        UserError, match=r"chat_template is tokenizer, but .* has none \(looked for chat_template"
    ):
        load_template("tokenizer", tmp_path)


def test_list_of_templates_without_a_default(tmp_path):
    write(tmp_path, "tokenizer_config.json", {"chat_template": 5})
    with pytest.raises(UserError, match="holds no text and no templates by name"):
        load_template("tokenizer", tmp_path)
