"""Marks on examples and answers are obeyed, or refused with their count."""

import pytest

from finetune.data.reading.conversation import make_conversation
from finetune.data.reading.formats import read_conversations
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.dataset import load_samples
from finetune.data.samples.drop_reasons import NOT_LEARNED
from finetune.data.templates.template import load_template
from finetune.errors import UserError

CHOSEN = ReadOptions(preference="chosen")
PAIR = {"query": "q", "response": "a"}


def dialogue(**marks):
    answers = [{"role": "assistant", "content": "a", **marks}, {"role": "assistant", "content": "b"}]
    prompts = [{"role": "user", "content": "q"}, {"role": "user", "content": "r"}]
    return {"messages": [prompts[0], answers[0], prompts[1], answers[1]]}


@pytest.mark.parametrize(
    "key", ["loss", "weight", "train", "training", "loss_weight", "loss_mask", "trainable"]
)
@pytest.mark.parametrize(
    ("value", "learned"), [(False, False), (0, False), (0.0, False), (True, True), (1, True), (None, True)]
)
def test_marks_of_answers(write_lines, key, value, learned):
    faults = FaultCollector()
    (read,) = read_conversations([write_lines(dialogue(**{key: value}))], faults=faults)
    assert [answer.learned for answer in read.answers] == [learned, True]
    assert sum(faults.notes.rules.values()) == (not learned) and not faults.notes.unused_fields


def test_marks_of_sharegpt_rounds(write_lines):
    rows = [
        {"from": "user", "value": "q"},
        {"from": "assistant", "value": "a", "loss": False},
        {"from": "user", "value": "r"},
        {"from": "assistant", "value": "b"},
    ]
    (read,) = read_conversations([write_lines({"conversations": rows})])
    assert [answer.learned for answer in read.answers] == [False, True]


@pytest.mark.parametrize("value", [0.5, 2, -1, "half", [1]])
def test_a_mark_that_is_neither_is_a_fault(write_lines, value):
    with pytest.raises(
        UserError, match=r"train\.json:1: messages\[1\]\.weight is .*: a mark on answers is true or false"
    ):
        read_conversations([write_lines(dialogue(weight=value))])


def test_marks_that_contradict_each_other_are_a_fault(write_lines):
    with pytest.raises(UserError, match="loss and train contradict each other"):
        read_conversations([write_lines(dialogue(loss=True, train=False))])


def test_a_prompt_marked_to_be_learned_is_told(write_lines):
    faults = FaultCollector()
    rows = [
        {"role": "user", "content": "q", "loss": True},
        {"role": "assistant", "content": "a", "loss": True},
    ]
    read_conversations([write_lines({"messages": rows})], faults=faults)
    assert faults.notes.rules == {"prompts marked to be learned, which are not": 1}


@pytest.mark.parametrize("key", ["loss", "train", "weight"])
@pytest.mark.parametrize("value", [False, 0, "false", "0"])
def test_marked_examples_are_left_out_and_counted(write_lines, key, value):
    faults = FaultCollector()
    file = write_lines({**PAIR, key: value}, {**PAIR, key: True}, {**PAIR, key: None}, PAIR)
    assert len(read_conversations([file], faults=faults)) == 3
    assert faults.notes.rules == {"examples marked as not to be learned left out": 1}


def test_a_conversation_without_any_answer_to_learn_is_dropped_with_its_reason(write_lines, encoder):
    rows = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    file = write_lines({"messages": rows}, dialogue())
    samples, report = load_samples([file], encoder, load_template(None), src_length=50, max_length=100)
    assert len(samples) == 1 and report.num_dropped == {NOT_LEARNED: 1}


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("value", [False, 0, "False"])
def test_bad_answers_are_refused_with_their_count(write_lines, key, value):
    file = write_lines(*[{**PAIR, key: True}] * 3, *[{**PAIR, key: value}] * 30)
    with pytest.raises(UserError) as caught:
        read_conversations([file])
    faults = caught.value.faults
    assert faults[0].startswith(
        "30 examples are marked as bad answers (label or kto_tag is false): these are data of"
    )
    assert "preference method (KTO)" in faults[0] and "preference to chosen" in faults[0]
    assert faults[1].startswith(f"{file}:4: {key} is false") and faults[-1] == "... and 10 more faulty lines."


@pytest.mark.parametrize("value", ["sports", 2, ["a"]])
def test_a_label_that_is_no_mark_is_named_as_a_field_that_is_not_used(write_lines, value):
    faults = FaultCollector()
    file = write_lines({**PAIR, "label": value}, {**PAIR, "label": None})
    assert len(read_conversations([file], faults=faults)) == 2
    assert faults.notes.unused_fields == {"label": 1} and not faults.notes.rules


def test_bad_answers_are_left_out_where_the_good_ones_are_asked_for(write_lines):
    file = write_lines({**PAIR, "label": True}, {**PAIR, "label": False}, PAIR)
    faults = FaultCollector()
    assert read_conversations([file], CHOSEN, faults) == [make_conversation([("q", "a")])] * 2
    assert faults.notes.rules == {"examples marked as bad answers": 1}


def test_skipping_faulty_lines_skips_bad_answers_and_counts_them(write_lines):
    faults = FaultCollector(skip=True)
    file = write_lines({**PAIR, "label": False}, PAIR)
    assert len(read_conversations([file], faults=faults)) == 1 and faults.num_faults == 1


PREFERENCES = [
    {"query": "q", "response": "a", "rejected_response": "b"},
    {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "rejected_response": "b",
    },
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    {"src": ["q"], "tgt": [], "response": ["b", "a"], "sort": [0, 1]},
    {"src": "q", "tgt": "", "response": ["a", "b"], "sort": [1, 0]},
    {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected": []},
]


@pytest.mark.parametrize("fields", PREFERENCES)
def test_preference_pairs(write_lines, fields):
    file = write_lines(fields)
    with pytest.raises(
        UserError,
        match=r"train\.json:1: these are preference pairs .* data of a preference method such as DPO",
    ):
        read_conversations([file])
    assert read_conversations([file], CHOSEN) == [make_conversation([("q", "a")])]


def test_a_pair_further_on_in_a_file_is_noticed(write_lines):
    file = write_lines({**PAIR, "rejected_response": None}, {**PAIR, "rejected_response": "b"})
    with pytest.raises(UserError, match=r"train\.json:2: these are preference pairs"):
        read_conversations([file])


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("[{'name': 'now'}]", "tools is text that is no JSON (Expecting property name"),
        ("now", "tools is text that is no JSON (Expecting value)"),
        ("3", "tools is a number, expected a list or JSON text"),
        (3, "tools is a number, expected a list or JSON text"),
    ],
)
def test_tools_that_are_no_json(write_lines, tools, reason):
    file = write_lines(dialogue(), {**dialogue(), "tools": tools})
    with pytest.raises(UserError) as caught:
        read_conversations([file])
    assert f"{file}:2: {reason}" in str(caught.value)


@pytest.mark.parametrize("tools", [None, "", "[]", [], " "])
def test_no_tools(write_lines, tools):
    (read,) = read_conversations([write_lines({**dialogue(), "tools": tools})])
    assert read.tools is None
