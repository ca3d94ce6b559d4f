"""Conversations out of order: each case has one stated rule, is counted, and learns what is told here."""

import pytest

from finetune.data.reading.formats import read_conversations
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.dataset import load_samples
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.data.templates.template import load_template
from finetune.errors import UserError

# One letter per role: what is said follows it. "A-" is an answer that is marked as not to be learned.
ROLES = {"S": "system", "U": "user", "A": "assistant", "T": "tool", "C": "tool_call"}


def make_messages(text):
    messages = []
    for word in text.split():
        mark = {"loss": False} if word[1:2] == "-" else {}
        content = None if word[1:] == "=" else word[1:].removeprefix("-")
        messages.append({"role": ROLES[word[0]], "content": content, **mark})
    return messages


CASES = {
    "in order": ("Sa Uq Ab", "a", "Uq Ab", {}),
    "system inside": ("Uq Aa Sm Ur Ab", None, "Uq Aa Um\nr Ab", "system messages inside a conversation"),
    "two systems": ("Ss St Uq Aa", "s\nt", "Uq Aa", "system messages joined"),
    "system last": ("Uq Aa Ss", None, "Uq Aa", "system messages behind everything left out"),
    "two prompts": ("Uq Ur Aa", None, "Uq\nr Aa", "prompts in a row joined"),
    "two answers": ("Uq Aa Ab", None, "Uq Aa\nb", "answers in a row joined"),
    "answer first": ("Ahello Uq Aa", None, "Uq Aa", "answers before the first prompt left out"),
    "prompt last": ("Uq Aa Ur", None, "Uq Aa", "prompts without an answer left out"),
    "tool result last": ("Uq Cc Tt", None, "Uq Cc", "prompts without an answer left out"),
    "empty answer inside": ("Uq A Ur Ab", None, "Uq A- Ur Ab", "empty answers inside a conversation"),
    "null of a tool": ("Uq Cc T= Aa", None, "Uq Cc T Aa", "messages with null read as empty"),
    "null of an answer": ("Uq A= Ur Ab", None, "Uq A- Ur Ab", "messages with null read as empty"),
    "marked answer": ("Uq A-a Ur Ab", None, "Uq A-a Ur Ab", "answers marked as not to be learned"),
}


@pytest.mark.parametrize("name", CASES)
def test_rules(write_lines, name):
    text, system, expected, rule = CASES[name]
    faults = FaultCollector()
    (conversation,) = read_conversations([write_lines({"messages": make_messages(text)})], faults=faults)
    letters = {role: letter for letter, role in ROLES.items()}
    shown = [f"{letters[m.role]}{'' if m.learned else '-'}{m.content}" for m in conversation.messages]
    assert (conversation.system, " ".join(shown)) == (system, expected)
    assert not rule or any(told.startswith(rule) for told in faults.notes.rules)
    assert bool(rule) == bool(faults.notes.rules)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "messages holds no message"),
        ("Aa Ab", "messages holds no message"),
        ("Ss", "messages holds no message"),
        ("Uq", "messages ends with a message from user"),
        ("Tt Aa", "messages[0] is from tool, expected user as the first"),
        ("Uq Cc Aa", "messages[2] is from assistant, expected user or tool behind tool_call"),
        ("Uq Tt Aa", "messages[1] is from tool, expected assistant or tool_call behind user"),
        ("Uq Aa A-b", "messages[2] follows another answer with another mark"),
    ],
)
def test_what_no_rule_covers_is_a_fault(write_lines, text, reason):
    file = write_lines({"messages": make_messages(text)})
    with pytest.raises(UserError) as caught:
        read_conversations([file])
    assert f"{file}:1: {reason}" in str(caught.value)


def learned_text(sample, encoder) -> str:
    """The characters of a sample, those with a label in brackets."""
    tokens = [sample.input_ids[0], *(label if label != IGNORE_INDEX else None for label in sample.labels)]
    ids = [*sample.input_ids, sample.labels[-1]]
    shown = ""
    for place, token in enumerate(ids):
        is_learned = place > 0 and tokens[place] is not None
        was_learned = place > 1 and tokens[place - 1] is not None
        shown += "[" if is_learned and not was_learned else "]" if was_learned and not is_learned else ""
        shown += encoder.decode([token])
    return shown + ("]" if tokens[-1] is not None else "")


MASKS = {
    # shape: (fields, what is learned, without a template)
    "src_tgt": ({"src": ["q", "r"], "tgt": ["a", "b"]}, "<s>q[a</s>]r[b</s>]"),
    "src_tgt with an empty answer": ({"src": ["q", "r"], "tgt": ["", "b"]}, "<s>q</s>r[b</s>]"),
    "history": ({"query": "r", "response": "b", "history": [["q", "a"]]}, "<s>q[a</s>]r[b</s>]"),
    "text": ({"text": "ab"}, "<s>[ab</s>]"),
    "null prompt": ({"query": None, "response": "ab"}, "<s>[ab</s>]"),
    "first answer marked": ({"messages": make_messages("Uq A-a Ur Ab")}, "<s>qa</s>r[b</s>]"),
    "last answer marked": ({"messages": make_messages("Uq Aa Ur A-b")}, "<s>q[a</s>]"),
    "answers joined": ({"messages": make_messages("Uq Aa Ab")}, "<s>q[a\nb</s>]"),
    "prompt last": ({"messages": make_messages("Uq Aa Ur")}, "<s>q[a</s>]"),
    "system inside": ({"messages": make_messages("Uq Aa Sm Ur Ab")}, "<s>q[a</s>]m\nr[b</s>]"),
}


@pytest.mark.parametrize("name", MASKS)
def test_which_characters_carry_labels(write_lines, encoder, name):
    fields, expected = MASKS[name]
    samples, _ = load_samples(
        [write_lines(fields)], encoder, load_template(None), src_length=50, max_length=100
    )
    assert learned_text(samples[0], encoder) == expected


@pytest.mark.parametrize(
    "template", ["llama2", "mistral", "baichuan", "vicuna", "chatglm2", "alpaca", "gemma", "chatml"]
)
def test_a_marked_answer_stands_in_the_text_of_every_template_without_labels(write_lines, encoder, template):
    chat = load_template(template)
    chat.special_tokens = ()  # the tokenizer of this test has none of them
    marked = write_lines({"messages": make_messages("Uq A-xyz Ur Ab")}, name="marked.json")
    plain = write_lines({"messages": make_messages("Uq Axyz Ur Ab")}, name="plain.json")
    (first,), (second,) = (
        load_samples([file], encoder, chat, src_length=500, max_length=1000)[0] for file in (marked, plain)
    )
    assert first.input_ids.tolist() == second.input_ids.tolist()
    learned, both = (
        encoder.decode([label for label in sample.labels if label != IGNORE_INDEX])
        for sample in (first, second)
    )
    assert "xyz" in both and both.endswith(learned) and learned.strip().startswith("b")
