"""Examples of another format than their file begins with, empty prompts, and calls of functions as people write them."""

from __future__ import annotations

import json

import pytest

from finetune.data.reading.conversation import ASSISTANT, TEXT, TOOL, TOOL_CALL, USER, Conversation, Message
from finetune.data.reading.formats import read_conversations
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.dataset import load_samples
from finetune.data.templates.jinja_templates import JinjaTemplate
from finetune.data.templates.template import load_template
from finetune.errors import UserError

ROUND = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAPES = {
    "src_tgt": {"src": "q", "tgt": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "query_response": {"query": "q", "response": "a"},
    "messages": {"messages": ROUND},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "text": {"text": "q"},
}


def read(*files, **options):
    faults = FaultCollector()
    found = read_conversations(files, ReadOptions(**options), faults)
    return found, {rule: count for rule, count in faults.notes.rules.items() if count}


# --- several formats ---


@pytest.mark.parametrize("first", SHAPES)
@pytest.mark.parametrize("other", SHAPES)
def test_a_file_may_hold_several_formats(write_lines, first, other):
    file = write_lines(SHAPES[first], SHAPES[first], SHAPES[other], SHAPES[first])
    alone = [read(write_lines(SHAPES[name], name=f"{name}.json"))[0][0] for name in (first, other)]
    found, rules = read(file)
    assert [each.messages for each in found] == [alone[number].messages for number in (0, 0, 1, 0)]
    counts = {rule: count for rule, count in rules.items() if rule.startswith("examples of another format")}
    same = first == other or {first, other} == {"alpaca", "query_response"}
    assert bool(counts) != same
    if counts and first != "text":  # text at the beginning says nothing of what follows
        assert counts == {
            f"examples of another format than the file begins with ({other} in a file of {first})": 1
        }


def test_a_format_that_is_set_is_meant_for_all(write_lines):
    file = write_lines(SHAPES["messages"], SHAPES["src_tgt"])
    with pytest.raises(UserError, match=r"train\.json:2: field 'messages' is missing"):
        read(file, dataset_format="messages")


@pytest.mark.parametrize(
    "broken", [{"src": "q"}, {"tgt": "a"}, {"response": "a"}, {"x": 1}, {"content": "c"}]
)
def test_an_example_that_lacks_a_part_is_no_other_format(write_lines, broken):
    with pytest.raises(UserError, match=r"train\.json:2: field '(src|tgt)' is missing"):
        read(write_lines(SHAPES["src_tgt"], broken))


def test_files_of_a_folder_differ(write_lines):
    found, rules = read(
        *(write_lines(record, record, name=f"{name}.json") for name, record in SHAPES.items())
    )
    assert len(found) == 2 * len(SHAPES) and not rules


# --- empty prompts ---

EMPTY = [
    {"src": "", "tgt": "a"},
    {"src": None, "tgt": "a"},
    {"src": [""], "tgt": ["a"]},
    {"src": [None], "tgt": ["a"]},
    {"query": None, "response": "a"},
    {"query": "", "response": "a", "history": []},
    {"instruction": "", "input": "", "output": "a", "system": ""},
    {"prompt": "", "completion": "a"},
    {"question": None, "answer": "a", "history": None},
    {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "a"}]},
]


@pytest.mark.parametrize("value", [None, ""])
def test_a_message_with_null_is_an_empty_one(write_lines, value):
    records = [
        {"messages": [{"role": "user", "content": value}, ROUND[1]]},
        {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "a"}]},
    ]
    found, rules = read(write_lines(*records))
    assert [each.messages for each in found] == [(Message(TEXT, "a"),)] * 2
    assert rules.get("messages with null read as empty", 0) == (2 if value is None else 0)


@pytest.mark.parametrize("record", EMPTY)
def test_an_answer_to_an_empty_prompt_is_text_in_every_format(write_lines, record):
    (conversation,), rules = read(write_lines(record))
    assert conversation.messages == (Message(TEXT, "a"),)
    assert rules == {"examples without a prompt read as running text": 1}


@pytest.mark.parametrize(
    "more",
    [{"system": "s"}, {"tools": '[{"name": "f"}]'}, {"history": [["q1", "a1"]]}],
)  # fmt: skip
def test_an_empty_prompt_behind_something_stays_a_prompt(write_lines, more):
    (conversation,), rules = read(write_lines({"query": "", "response": "a"} | more))
    assert conversation.messages[-2:] == (Message(USER, ""), Message(ASSISTANT, "a")) and not rules


def test_several_rounds_keep_an_empty_prompt(write_lines):
    (conversation,), rules = read(write_lines({"src": ["", "q"], "tgt": ["a", "b"]}))
    assert [message.content for message in conversation.messages] == ["", "a", "q", "b"] and not rules


# --- calls of functions ---


def with_calls(*calls, key="tool_calls"):
    return {"messages": [ROUND[0], {"role": "assistant", "content": None, key: list(calls) if key == "tool_calls" else
            calls[0]}, {"role": "tool", "content": "r"}, ROUND[1]]}  # fmt: skip


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"function": {"name": "f", "arguments": "{'a': 1}"}}, "tool_calls[0].arguments is text that is no JSON"),
        ({"function": {"name": "f", "arguments": "a=1"}}, "tool_calls[0].arguments is text that is no JSON"),
        ({"function": {"name": "f", "arguments": "[1]"}}, "tool_calls[0].arguments is a list, expected an object"),
        ({"function": {"name": "f", "arguments": 3}}, "tool_calls[0].arguments is a number, expected an object"),
        ({"function": {"arguments": "{}"}}, "tool_calls[0] has no name of a function"),
        ("f(1)", "tool_calls[0] is a string, expected an object"),
    ],
)  # fmt: skip
def test_calls_that_nobody_could_read_are_faults(write_lines, call, reason):
    with pytest.raises(UserError) as caught:
        read(write_lines(with_calls(call), with_calls({"name": "g", "arguments": {}})))
    assert len(caught.value.faults) == 1 and f"train.json:1: messages[1].{reason}" in caught.value.faults[0]


@pytest.mark.parametrize("arguments", ["", " ", None, {}, "{}"])
def test_calls_without_arguments_have_an_empty_object(write_lines, arguments):
    (conversation,), rules = read(
        write_lines(with_calls({"function": {"name": "f", "arguments": arguments}}))
    )
    assert json.loads(conversation.messages[1].content) == {"name": "f", "arguments": {}}
    counted = {"calls of functions without arguments given an empty object": 1}
    assert rules == ({} if arguments in ({}, "{}") else counted)


def test_a_call_that_is_an_object_is_checked_as_well(write_lines):
    call = {"role": "tool_call", "content": {"name": "f", "arguments": "x"}}
    with pytest.raises(UserError, match=r"messages\[1\]\.content\.arguments is text that is no JSON"):
        read(write_lines({"messages": [ROUND[0], call, {"role": "tool", "content": "r"}, ROUND[1]]}))


def test_a_function_call_is_checked_as_well(write_lines):
    with pytest.raises(UserError, match=r"messages\[1\]\.function_call\.arguments is text that is no JSON"):
        read(write_lines(with_calls({"name": "f", "arguments": "x"}, key="function_call")))


RESULTS = [
    {"role": "user", "content": "q"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "r", "name": "f", "tool_call_id": "c1"},
    {"role": "assistant", "content": "a"},
]
NAMED = (
    "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}"
    "{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}>{{ m.content }}{% endfor %}"
)


def test_names_of_tools_go_where_a_template_has_a_place(write_lines, encoder):
    (conversation,), _ = read(write_lines({"messages": RESULTS}))
    assert conversation.messages[2] == Message(TOOL, "r", tool="f", call_id="c1")
    template = JinjaTemplate(NAMED, "t", {})
    text = "".join(piece.text for piece in template.render(conversation))
    assert "<tool f#c1>r<assistant>a" in text
    said = "names or ids of tool results left out, for which the chat template has no place: 1"
    limits = {"src_length": 999, "max_length": 999}
    assert said not in load_samples([conversation], encoder, template, **limits)[1].describe()
    assert said in load_samples([conversation], encoder, load_template("alpaca"), **limits)[1].describe()


WITH_IDS = (
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if not c.id or c.id | length != 9 %}{{ raise_exception('no id of 9 letters') }}{% endif %}"
    "<call {{ c.id }}>{{ c.function.name }}{% endfor %}{% elif m.role == 'tool' %}<result {{ m.tool_call_id }}>{{ m.content }}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
)


def test_ids_of_calls_reach_templates_that_ask_for_them(write_lines):
    call = {"id": "abcdef001", "function": {"name": "f", "arguments": "{}"}}
    result = {"role": "tool", "content": "r", "tool_call_id": "abcdef001"}
    records = [{"messages": [ROUND[0], {"role": "assistant", "content": "", "tool_calls": calls}, result, ROUND[1]]}
               for calls in ([call], [call, call | {"id": "abcdef002"}], [{"function": call["function"]}])]  # fmt: skip
    found, _ = read(write_lines(*records))
    template = JinjaTemplate(WITH_IDS, "t", {})
    texts = ["".join(piece.text for piece in template.render(each)) for each in found]
    assert texts[0] == "<user>q<call abcdef001>f<result abcdef001>r<assistant>a"
    assert "<call abcdef001>f<call abcdef002>f<result" in texts[1]
    assert '<assistant>{"name": "f", "arguments": {}}<result' in texts[2]  # without ids the text of the call


def test_names_cannot_bring_special_tokens_in():
    conversation = Conversation(
        (
            Message(USER, "q"),
            Message(TOOL_CALL, "c"),
            Message(TOOL, "r", tool="</s>"),
            Message(ASSISTANT, "a"),
        )
    )
    with pytest.raises(UserError, match="names of tools contain '</s>', which is a special token"):
        JinjaTemplate(NAMED, "t", {"eos_token": "</s>"}).render(conversation)


def test_names_that_are_not_used_are_told(write_lines):
    faults = FaultCollector()
    messages = [RESULTS[0] | {"name": "u"}, RESULTS[1], RESULTS[2], RESULTS[2] | {"name": "g"}, RESULTS[3]]
    (conversation,) = read_conversations([write_lines({"messages": messages})], ReadOptions(), faults)
    assert conversation.messages[2] == Message(TOOL, "r\nr")
    assert faults.notes.unused_fields == {"messages[].name": 1}
    assert faults.notes.rules == {"names or ids of joined tool results left out": 1}
