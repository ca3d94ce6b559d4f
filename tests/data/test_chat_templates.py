"""Every named template written out; learned parts in braces, special tokens after a section sign."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune.data.reading.conversation import Conversation, Message, make_conversation
from finetune.data.samples.tokenize import IGNORE_INDEX, SampleBuilder
from finetune.data.templates.chat_templates import CHAT_FORMATS
from finetune.data.templates.template import NamedTemplate, load_template
from finetune.errors import UserError
from tests.data.conftest import build_sample

TWO_ROUNDS = make_conversation([("q1", "a1"), ("q2", "a2")], "sys")
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# name: (two rounds with a system text, one round without)
WRITTEN = {
    "llama2": (
        "§<s>[INST] <<SYS>>\nsys\n<</SYS>>\n\nq1 [/INST]{ a1 }§<s>[INST] q2 [/INST]{ a2 }",
        "§<s>[INST] q [/INST]{ a }",
    ),
    "llama3": (
        "§<|begin_of_text|>§<|start_header_id|>system§<|end_header_id|>\n\nsys§<|eot_id|>"
        "§<|start_header_id|>user§<|end_header_id|>\n\nq1§<|eot_id|>"
        "§<|start_header_id|>assistant§<|end_header_id|>\n\n{a1}{§<|eot_id|>}"
        "§<|start_header_id|>user§<|end_header_id|>\n\nq2§<|eot_id|>"
        "§<|start_header_id|>assistant§<|end_header_id|>\n\n{a2}{§<|eot_id|>}",
        "§<|begin_of_text|>§<|start_header_id|>user§<|end_header_id|>\n\nq§<|eot_id|>"
        "§<|start_header_id|>assistant§<|end_header_id|>\n\n{a}{§<|eot_id|>}",
    ),
    "mistral": (
        "§<s>[INST] sys\n\nq1 [/INST]{ a1}[INST] q2 [/INST]{ a2}",
        "§<s>[INST] q [/INST]{ a}",
    ),
    "chatml": (
        "§<|im_start|>system\nsys§<|im_end|>\n§<|im_start|>user\nq1§<|im_end|>\n§<|im_start|>assistant\n"
        "{a1}{§<|im_end|>}\n§<|im_start|>user\nq2§<|im_end|>\n§<|im_start|>assistant\n{a2}{§<|im_end|>}",
        "§<|im_start|>user\nq§<|im_end|>\n§<|im_start|>assistant\n{a}{§<|im_end|>}",
    ),
    "qwen": (
        "§<|im_start|>system\nsys§<|im_end|>\n§<|im_start|>user\nq1§<|im_end|>\n§<|im_start|>assistant\n"
        "{a1}{§<|im_end|>}\n§<|im_start|>user\nq2§<|im_end|>\n§<|im_start|>assistant\n{a2}{§<|im_end|>}",
        "§<|im_start|>system\nYou are a helpful assistant.§<|im_end|>\n"
        "§<|im_start|>user\nq§<|im_end|>\n§<|im_start|>assistant\n{a}{§<|im_end|>}",
    ),
    "chatglm": (
        "sys\n[Round 0]\n问：q1\n答：{a1}\n[Round 1]\n问：q2\n答：{a2}",
        "q{a}",
    ),
    "chatglm2": (
        "sys\n\n[Round 1]\n\n问：q1\n\n答：{a1}\n\n[Round 2]\n\n问：q2\n\n答：{a2}",
        "[Round 1]\n\n问：q\n\n答：{a}",
    ),
    "chatglm3": (
        "§<|system|>\n sys§<|user|>\n q1§<|assistant|>{\n a1}{§<|user|>}\n q2§<|assistant|>{\n a2}{§<|user|>}",
        "§<|user|>\n q§<|assistant|>{\n a}{§<|user|>}",
    ),
    "glm4": (
        "§[gMASK]§<sop>§<|system|>\nsys§<|user|>\nq1§<|assistant|>{\na1}{§<|user|>}\nq2§<|assistant|>{\na2}{§<|user|>}",
        "§[gMASK]§<sop>§<|user|>\nq§<|assistant|>{\na}{§<|user|>}",
    ),
    "internlm": (
        "<|System|>:sys\n<|User|>:q1\n<|Bot|>:{a1}{§<eoa>}\n<|User|>:q2\n<|Bot|>:{a2}{§<eoa>}",
        "<|User|>:q\n<|Bot|>:{a}{§<eoa>}",
    ),
    "internlm_eoh": (
        "<|System|>:sys\n<|User|>:q1§<eoh>\n<|Bot|>:{a1}{§<eoa>}\n<|User|>:q2§<eoh>\n<|Bot|>:{a2}{§<eoa>}",
        "<|User|>:q§<eoh>\n<|Bot|>:{a}{§<eoa>}",
    ),
    "xverse": (
        "sys\n\nHuman: q1\n\nAssistant: {a1}Human: q2\n\nAssistant: {a2}",
        "Human: q\n\nAssistant: {a}",
    ),
    "ziya": (
        "sys<human>:q1\n<bot>:{a1}\n<human>:q2\n<bot>:{a2}",
        "<human>:q\n<bot>:{a}",
    ),
    "openbuddy": (
        "sys\n\nUser: q1\nAssistant:{ a1}\nUser: q2\nAssistant:{ a2}",
        "User: q\nAssistant:{ a}",
    ),
    "alpaca": (
        "sys\n\n### Instruction:\nq1\n\n### Response:\n{a1}\n\n### Instruction:\nq2\n\n### Response:\n{a2}",
        ALPACA + "\n\n### Instruction:\nq\n\n### Response:\n{a}",
    ),
    "baichuan": (
        "sys§<reserved_102>q1§<reserved_103>{a1}§<reserved_102>q2§<reserved_103>{a2}",
        "§<reserved_102>q§<reserved_103>{a}",
    ),
    "baichuan2": (
        "sys§<reserved_106>q1§<reserved_107>{a1}§<reserved_106>q2§<reserved_107>{a2}",
        "§<reserved_106>q§<reserved_107>{a}",
    ),
    "gemma": (
        "§<bos>§<start_of_turn>user\nsys\n\nq1§<end_of_turn>\n§<start_of_turn>model\n{a1}{§<end_of_turn>}\n"
        "§<start_of_turn>user\nq2§<end_of_turn>\n§<start_of_turn>model\n{a2}{§<end_of_turn>}",
        "§<bos>§<start_of_turn>user\nq§<end_of_turn>\n§<start_of_turn>model\n{a}{§<end_of_turn>}",
    ),
    "mistral_small": (
        "§<s>§[SYSTEM_PROMPT]sys§[/SYSTEM_PROMPT]§[INST]q1§[/INST]{a1}§[INST]q2§[/INST]{a2}",
        "§<s>§[INST]q§[/INST]{a}",
    ),
    "ernie4_5": (
        "§<|begin_of_sentence|>sys\nUser: q1\nAssistant: {a1}{§<|end_of_sentence|>}"
        "User: q2\nAssistant: {a2}{§<|end_of_sentence|>}",
        "§<|begin_of_sentence|>User: q\nAssistant: {a}{§<|end_of_sentence|>}",
    ),
    "phi3": (
        "§<|system|>\nsys§<|end|>\n§<|user|>\nq1§<|end|>\n§<|assistant|>\n{a1}{§<|end|>}\n"
        "§<|user|>\nq2§<|end|>\n§<|assistant|>\n{a2}{§<|end|>}",
        "§<|user|>\nq§<|end|>\n§<|assistant|>\n{a}{§<|end|>}",
    ),
    "phi4": (
        "§<|im_start|>system§<|im_sep|>sys§<|im_end|>"
        "§<|im_start|>user§<|im_sep|>q1§<|im_end|>§<|im_start|>assistant§<|im_sep|>{a1}{§<|im_end|>}"
        "§<|im_start|>user§<|im_sep|>q2§<|im_end|>§<|im_start|>assistant§<|im_sep|>{a2}{§<|im_end|>}",
        "§<|im_start|>user§<|im_sep|>q§<|im_end|>§<|im_start|>assistant§<|im_sep|>{a}{§<|im_end|>}",
    ),
    "phi4_mini": (
        "§<|system|>sys§<|end|>§<|user|>q1§<|end|>§<|assistant|>{a1}{§<|end|>}"
        "§<|user|>q2§<|end|>§<|assistant|>{a2}{§<|end|>}",
        "§<|user|>q§<|end|>§<|assistant|>{a}{§<|end|>}",
    ),
    "falcon": (
        "System: sys\nUser: q1\nFalcon:{ a1}\nUser: q2\nFalcon:{ a2}",
        "User: q\nFalcon:{ a}",
    ),
    "granite": (
        "§<|start_of_role|>system§<|end_of_role|>sys§<|end_of_text|>\n"
        "§<|start_of_role|>user§<|end_of_role|>q1§<|end_of_text|>\n"
        "§<|start_of_role|>assistant§<|end_of_role|>{a1}{§<|end_of_text|>}\n"
        "§<|start_of_role|>user§<|end_of_role|>q2§<|end_of_text|>\n"
        "§<|start_of_role|>assistant§<|end_of_role|>{a2}{§<|end_of_text|>}",
        "§<|start_of_role|>user§<|end_of_role|>q§<|end_of_text|>\n"
        "§<|start_of_role|>assistant§<|end_of_role|>{a}{§<|end_of_text|>}",
    ),
    "polylm": (
        "sys\n<|user|>\nq1\n<|assistant|>\n{a1}\n<|user|>\nq2\n<|assistant|>\n{a2}",
        "<|user|>\nq\n<|assistant|>\n{a}",
    ),
    "seqgpt": (
        "sys\n输入: q1\n输出: [GEN]{a1}\n输入: q2\n输出: [GEN]{a2}",
        "输入: q\n输出: [GEN]{a}",
    ),
    "bloomz": ("sys\nq1{ a1}\nq2{ a2}", "q{ a}"),
    "vicuna": (
        "sys USER: q1 ASSISTANT:{ a1}USER: q2 ASSISTANT:{ a2}",
        VICUNA + " USER: q ASSISTANT:{ a}",
    ),
}

WRITTEN |= dict.fromkeys(("internlm2", "yi"), WRITTEN["chatml"])
WRITTEN |= dict.fromkeys(("gemma2", "gemma3"), WRITTEN["gemma"])
WRITTEN |= {"qwen2": WRITTEN["qwen"], "mixtral": WRITTEN["mistral"]}


def show(pieces):
    texts = ["§" * piece.special + piece.text for piece in pieces]
    return "".join(
        f"{{{text}}}" if piece.learned else text for piece, text in zip(pieces, texts, strict=True)
    )


def test_every_template_is_written_out_here():
    assert set(WRITTEN) == set(CHAT_FORMATS)


@pytest.mark.parametrize("name", WRITTEN)
def test_exact_string(name):
    template = load_template(name)
    with_system, without = WRITTEN[name]
    assert show(template.render(TWO_ROUNDS)) == with_system
    assert show(template.render(make_conversation([("q", "a")]))) == without
    ends = tuple("{§" + token + "}" for token in template.special_tokens) or ("no token",)
    assert template.appends_eos == (not with_system.endswith(ends))


@pytest.mark.parametrize("name", WRITTEN)
def test_prompt_is_what_stands_before_the_last_answer(name):
    template = load_template(name)
    whole, prompt = template.render(TWO_ROUNDS), template.render_prompt(TWO_ROUNDS)
    assert whole[: len(prompt)] == prompt
    assert all(piece.learned for piece in whole[len(prompt) :])


@pytest.mark.parametrize("name", WRITTEN)
def test_empty_system_text_leaves_the_default_out(name):
    with_default = show(load_template(name).render(make_conversation([("q", "a")])))
    without = show(load_template(name).render(make_conversation([("q", "a")], "")))
    assert (without != with_default) == (CHAT_FORMATS[name].default_system is not None)
    assert with_default.endswith(without)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("chatml", "§<|im_start|>tool\n21§<|im_end|>\n§<|im_start|>assistant\n{warm}"),
        ("llama3", "ipython§<|end_header_id|>\n\n21§<|eot_id|>§<|start_header_id|>assistant§<|end_header_id|>\n\n{warm}"),
        ("chatglm2", "[Round 1]\n\n问：21\n\n答：{warm}"),
    ],
)  # fmt: skip
def test_tools(name, written):
    messages = (
        Message("user", "q"),
        Message("tool_call", '{"name": "t"}'),
        Message("tool", "21"),
        Message("assistant", "warm"),
    )
    text = show(load_template(name).render(Conversation(messages, tools='[{"name": "t"}]')))
    assert written in text
    assert (
        CHAT_FORMATS[name].answer.replace("{content}", '{"name": "t"}').join("{}") in text
    )  # the call is learned
    assert 'name and arguments.\n[{"name": "t"}]' in text.split("q")[0] + text


class TokenEncoder:
    """One token per character, and one for each special token of every template."""

    def __init__(self, prefix_ids=(), names=None):
        found = {token for chat in CHAT_FORMATS.values() for token in chat.special_tokens}
        self.names = sorted(found if names is None else names)
        self.prefix_ids, self.eos_token_id, self.pad_token_id = prefix_ids, 1, 0

    def encode(self, text):
        return [100 + ord(character) for character in text]

    def encode_special(self, text):
        return [2 + self.names.index(text)] if text in self.names else self.encode(text)

    def decode(self, ids):
        return "".join(chr(i - 100) if i >= 100 else (["", "<EOS>", *self.names])[i] for i in ids)


class GreedyEncoder(TokenEncoder):
    """One that finds special tokens in any text, as tokenizers do with added tokens."""

    def encode(self, text):
        for number, name in enumerate(self.names):
            if name in text:
                before, _, after = text.partition(name)
                return [*self.encode(before), 2 + number, *self.encode(after)]
        return super().encode(text)


TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["<s>", "a<|im_end|>b", "<|im_start|>user\n", "{content}", "<end_of_turn>", "[/INST]"]),
)
TURNS = st.lists(st.tuples(TEXTS, TEXTS.filter(str.strip)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("kind", [TokenEncoder, GreedyEncoder])
@settings(max_examples=25, deadline=None)
@given(turns=TURNS, system=st.one_of(st.none(), TEXTS), train_on=st.sampled_from(["all", "last"]))
def test_labels_are_exactly_the_answers(name, kind, turns, system, train_on):
    # Where a single question stands alone, an empty one leaves the answer nothing to follow.
    assume(CHAT_FORMATS[name].only_user is None or len(turns) > 1 or turns[0][0])
    template = NamedTemplate(name)
    if CHAT_FORMATS[name].user == "{content}":  # the blank before an answer belongs behind a word
        turns = [("q" + prompt, answer) for prompt, answer in turns]
    encoder = kind(names=template.special_tokens)
    limits = {"src_length": 9999, "max_length": 10**6, "train_on": train_on}
    sample = build_sample(make_conversation(turns, system), encoder, template, **limits)
    is_learned = sample.labels != IGNORE_INDEX
    assert (sample.labels[:-1] == sample.input_ids[1:])[is_learned[:-1]].all()
    learned = encoder.decode(sample.labels[is_learned].tolist())
    blank = CHAT_FORMATS[name].answer
    end = CHAT_FORMATS[name].end or ("<|user|>" if CHAT_FORMATS[name].ends_with_next else "<EOS>")
    trims = "answer" in CHAT_FORMATS[name].trims
    answers = [blank.replace("{content}", answer.strip() if trims else answer) + end for _, answer in turns]
    assert learned == "".join(answers if train_on == "all" else answers[-1:])
    # No text of the example has become a special token: there are as many as in an example of plain texts.
    plain_turns = make_conversation([("q", "a")] * len(turns), system and "s")
    plain = build_sample(plain_turns, encoder, template, **limits)
    ids, plain_ids = ([*each.input_ids, each.labels[-1]] for each in (sample, plain))
    assert [i for i in ids if i < 100] == [i for i in plain_ids if i < 100]


def test_a_call_at_the_end_is_closed_by_the_token_that_opens_its_result():
    asked = Conversation((Message("user", "q"), Message("tool_call", "{}")))
    assert show(load_template("glm4").render(asked)).endswith("§<|assistant|>{\n{}}{§<|observation|>}")


def test_tokens_that_the_tokenizer_lacks_are_refused():
    encoder = TokenEncoder(names=["<s>"])
    with pytest.raises(
        UserError, match=r"chat_template chatml writes the special tokens <\|im_start\|>, <\|im_end\|>"
    ):
        SampleBuilder(encoder, NamedTemplate("chatml"), src_length=9)
    SampleBuilder(encoder, NamedTemplate("llama2"), src_length=9)


def test_opening_that_the_tokenizer_writes_too_is_not_doubled():
    encoder = TokenEncoder(prefix_ids=(2,), names=["<s>"])
    sample = build_sample(TWO_ROUNDS, encoder, NamedTemplate("llama2"), src_length=99, max_length=99)
    assert sample.input_ids.tolist().count(2) == 2


def test_blank_between_words_is_left_to_tokenizers_that_write_one():
    class Blanks(TokenEncoder):
        def encode(self, text):
            return super().encode(" " + text)

    encoder = Blanks(names=["<s>"])
    chat = make_conversation([("q", "a")])
    ids = build_sample(chat, encoder, NamedTemplate("mistral"), src_length=99, max_length=99)
    assert encoder.decode([*ids.input_ids, ids.labels[-1]]) == "<s> [INST] q [/INST] a<EOS>"


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("llama2", "§<s>[INST] <<SYS>>\n s\n\n<</SYS>>\n\nq [/INST]{ a }"),
        (
            "llama3",
            "§<|end_header_id|>\n\ns§<|eot_id|>§<|start_header_id|>user§<|end_header_id|>\n\nq§<|eot_id|>",
        ),
        (
            "gemma3",
            "§<start_of_turn>user\n s\n\n\nq§<end_of_turn>\n§<start_of_turn>model\n{a}{§<end_of_turn>}",
        ),
        ("chatml", "user\n q\n§<|im_end|>\n§<|im_start|>assistant\n{\na }{§<|im_end|>}"),
    ],
)
def test_blanks_at_the_ends_go_where_the_publisher_takes_them_away(name, written):
    assert written in show(load_template(name).render(make_conversation([(" q\n", "\na ")], " s\n")))


def test_glm4_writes_functions_and_calls_as_its_publisher_does():
    function = {"name": "weather", "parameters": {"type": "object"}}
    calls = ['{"name": "weather", "arguments": {"city": "北京"}}', '{"name": "clock", "arguments": {}}']
    messages = (
        Message("user", "q"),
        Message("tool_call", "\n".join(["I look.", *calls])),
        Message("tool", "21"),
        Message("tool_call", calls[0]),
    )
    conversation = Conversation(
        messages,
        system="sys",
        tools=json.dumps([{"type": "function", "function": function}, {"name": "clock"}]),
    )
    assert show(load_template("glm4").render(conversation)) == (
        "§[gMASK]§<sop>§<|system|>\n# 可用工具\n\n## weather\n\n" + json.dumps(function, indent=4) + "\n"
        "在调用上述函数时，请使用 Json 格式表示调用的参数。\n"
        '## clock\n\n{\n    "name": "clock"\n}\n在调用上述函数时，请使用 Json 格式表示调用的参数。'
        "§<|system|>\nsys§<|user|>\nq§<|assistant|>{\nI look.}{§<|assistant|>}"
        '{weather\n{"city": "北京"}}{§<|assistant|>}{clock\n{}}{§<|observation|>}\n21§<|assistant|>'
        '{weather\n{"city": "北京"}}{§<|observation|>}'
    )
