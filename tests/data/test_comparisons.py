"""Data of preference methods: every shape becomes a prompt with two answers, or with one that is marked."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.reading.conversation import ASSISTANT, USER, Message
from finetune.data.reading.formats import convert, read_conversations
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.records import FaultCollector, Record
from finetune.data.reading.splits import find_sources, read_splits
from finetune.errors import UserError
from finetune.settings.data import DataArguments

PAIRS, MARKED = (ReadOptions(comparison=kind) for kind in ("pairs", "marked"))
Q, A, B = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
EARLIER = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "o"}]
SHAREGPT = [{"from": "human", "value": "q"}]


def read(write_lines, *rows, options=PAIRS, faults=None):
    return read_conversations([write_lines(*rows)], options, faults)


def shown(conversation):
    """Texts of the prompt, the answer, and the rejected one."""
    *prompt, answer = [message.content for message in conversation.messages]
    rejected = conversation.comparison.rejected
    return prompt, answer, rejected and rejected.content


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"messages": [Q], "chosen": A, "rejected": B},
        {"chosen": [Q, A], "rejected": [Q, B]},
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A], "score_chosen": 9.0},
        {"prompt": "q", "chosen": ["a"], "rejected": ["b"]},
        {"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"query": "q", "response": "a", "rejected_response": "b"},
        {"messages": [Q, A], "rejected_response": "b"},
        {"messages": [Q, A], "rejected_response": [B]},
        {"messages": [Q, A], "rejected_messages": [Q, B]},
        {"prompt": "q", "chosen_response": "a", "rejected_response": "b"},
        {"input": {"messages": [Q], "tools": []}, "preferred_output": [A], "non_preferred_output": [B]},
        {"src": ["q"], "tgt": [], "response": ["a", "b"], "sort": [1, 0]},
        {"src": "q", "tgt": "", "response": ["b", "a"], "sort": [1, 2]},
        {"src": ["q"], "tgt": [], "response": [["a"], ["b"]], "sort": [1, 0]},
        {"instruction": "q", "output": ["a", "b"]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a".strip(), "rejected": "b"},
    ],
)  # fmt: skip
def test_shapes_of_pairs(write_lines, fields):
    (conversation,) = read(write_lines, fields)
    assert shown(conversation) == (["q"], "a", "b")
    good, bad = read(write_lines, fields, options=MARKED)
    assert [shown(each)[:2] for each in (good, bad)] == [(["q"], "a"), (["q"], "b")]
    assert (good.comparison.desirable, bad.comparison.desirable) == (True, False)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [*EARLIER, Q, A], "rejected_response": "b"},
        {"chosen": [*EARLIER, Q, A], "rejected": [*EARLIER, Q, B]},
        {"src": ["p", "q"], "tgt": ["o"], "response": ["b", "a"], "sort": [0, 1]},
        {"query": "q", "response": "a", "rejected_response": "b", "history": [["p", "o"]]},
        {
            "chosen": "\n\nHuman: p\n\nAssistant: o\n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: p\n\nAssistant: o\n\nHuman: q\n\nAssistant: b",
        },
    ],
)
def test_the_common_beginning_is_the_prompt(write_lines, fields):
    (conversation,) = read(write_lines, fields)
    assert shown(conversation) == (["p", "o", "q"], "a", "b")
    assert [message.role for message in conversation.messages] == [USER, ASSISTANT] * 2


@pytest.mark.parametrize(
    ("fields", "desirable"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, True),
        ({"prompt": [Q], "completion": [A], "label": False}, False),
        ({"messages": [Q, A], "label": 0}, False),
        ({"conversations": [*SHAREGPT, {"from": "gpt", "value": "a"}], "kto_tag": "true"}, True),
        ({"instruction": "q", "input": "", "output": "a", "kto_tag": 1}, True),
        ({"src": ["q"], "tgt": [], "response": ["a"], "sort": [0]}, False),
        ({"src": "q", "response": "a", "sort": 1}, True),
    ],
)
def test_marked_answers(write_lines, fields, desirable):
    (conversation,) = read(write_lines, fields, options=MARKED)
    assert shown(conversation) == (["q"], "a", None)
    assert conversation.comparison.desirable is desirable
    with pytest.raises(UserError, match=r"train\.json:1: one answer .* is data of KTO"):
        read(write_lines, fields)


def test_what_stands_beside_a_pair(write_lines):
    fields = {
        "system": "s", "tools": [{"name": "now"}], "prompt": "q", "chosen": "a", "margin": 2,
        "rejected": {"role": "assistant", "content": "b", "reasoning_content": "thoughts"},
    }  # fmt: skip
    (conversation,) = read(write_lines, fields)
    assert conversation.system == "s" and conversation.tools == '[{"name": "now"}]'
    assert conversation.comparison.margin == 2.0
    assert conversation.comparison.rejected == Message(ASSISTANT, "b", reasoning="thoughts")


def test_a_rejected_tool_call(write_lines):
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "now", "arguments": "{}"}}],
    }
    (conversation,) = read(write_lines, {"messages": [Q], "chosen": call, "rejected": B})
    assert [conversation.messages[-1].role, conversation.comparison.rejected.role] == [
        "tool_call",
        "assistant",
    ]


def test_messages_whose_content_is_called_text(write_lines):
    talk, good, bad = (
        {"role": role, "text": text} for role, text in (("human", "q"), ("assistant", "a"), ("bot", "b"))
    )
    file = write_lines({"context": [talk], "chosen": good, "rejected": bad})
    options = ReadOptions(comparison="pairs", columns={"messages": "context"})
    assert [shown(each) for each in read_conversations([file], options)] == [(["q"], "a", "b")]


def test_ranked_lists_pair_the_best_with_each_below(write_lines):
    faults = FaultCollector()
    fields = {"src": ["q"], "tgt": [], "response": ["c", "a", "b", "d"], "sort": [2, 4, 4, 1]}
    read_pairs = read(write_lines, fields, {"prompt": "q", "response": ["a", "b", "c"]}, faults=faults)
    assert [shown(each)[1:] for each in read_pairs] == [("a", "c"), ("a", "d"), ("a", "b"), ("a", "c")]
    assert (
        faults.notes.rules["ranked lists read as pairs of the best answer and each that is ranked below it"]
        == 2
    )


def test_each_of_several_rejected_answers_makes_a_pair(write_lines):
    pairs = read(write_lines, {"prompt": "q", "chosen": "a", "rejected": ["b", "c"]})
    assert [shown(pair) for pair in pairs] == [(["q"], "a", "b"), (["q"], "a", "c")]


def test_whole_conversations_stand_for_themselves(write_lines):
    fields = {"messages": [Q, A], "prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}
    faults = FaultCollector()
    (conversation,) = read(write_lines, fields, options=ReadOptions(preference="chosen"), faults=faults)
    assert [message.content for message in conversation.messages] == ["q", "a"]
    assert faults.notes.unused_fields == {"messages": 1}


def test_a_registry_of_llama_factory(tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    pair = {"talk": SHAREGPT, "good": {"from": "gpt", "value": "a"}, "bad": {"from": "gpt", "value": "b"}}
    marked = {"messages": [{"who": "u", "text": "q"}, {"who": "a", "text": "a"}], "mark": False}
    ranked = {"instruction": "q", "output": ["a", "b"]}
    for name, fields in (("pair", pair), ("marked", marked), ("ranked", ranked)):
        (folder / f"{name}.json").write_text(json.dumps([fields]), encoding="utf-8")
    registry = {
        "pairs": {
            "file_name": "pair.json", "formatting": "sharegpt", "ranking": True,
            "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"},
        },
        "marks": {
            "file_name": "marked.json", "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "mark"},
            "tags": {"role_tag": "who", "content_tag": "text", "user_tag": "u", "assistant_tag": "a"},
        },
        "lists": {"file_name": "ranked.json", "ranking": True},
    }  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")

    def load(name, comparison):
        data = DataArguments(dataset_name_or_path=name, dataset_dir=str(folder))
        sources = find_sources(data, training=True, evaluating=False)
        return read_splits(
            data, sources, seed=0, training=True, evaluating=False, comparison=comparison
        ).train

    assert shown(*load("pairs", "pairs")) == shown(*load("lists", "pairs")) == (["q"], "a", "b")
    (bad,) = load("marks", "marked")
    assert shown(bad) == (["q"], "a", None) and bad.comparison.desirable is False


def test_pairs_without_a_preference_are_left_out_and_counted(write_lines):
    faults = FaultCollector()
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    assert len(read(write_lines, *rows, faults=faults)) == 1
    assert faults.notes.rules == {"pairs whose answers are equal left out": 1}
    faults = FaultCollector()
    ranked = {"src": ["q"], "tgt": [], "response": ["a", "b"], "sort": [1, 1]}
    assert read(write_lines, ranked, faults=faults) == []
    assert faults.notes.rules == {"examples whose answers all have one rank left out": 1}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "q", "response": "a"}, "nothing to compare an answer with .*needed: chosen and rejected"),
        ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "rejected is an empty list"),
        ({"prompt": "q", "chosen": "a", "rejected": ["b", {}]}, r"rejected\[0\] is a string, expected an object"),
        ({"prompt": "q", "rejected": "b"}, "field 'response' is missing|no known format"),
        ({"chosen": [Q, A], "rejected": [EARLIER[0], B]}, "of 2 and 2 messages the first 0 are equal"),
        ({"chosen": [Q, A], "rejected": [Q, B, *EARLIER]}, "of 2 and 4 messages the first 1 are equal"),
        ({"chosen": [Q, A], "rejected": [{"role": "system", "content": "s"}, Q, B]}, "another system text"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "large"}, "margin is a string, expected a number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1e300}, "margin is 1e.300, expected a number of"),
        ({"src": ["q"], "tgt": [], "response": ["a", "b"], "sort": [1]}, "response and sort must be lists"),
        ({"text": "t", "rejected": "b"}, "no prompt"),
    ],
)  # fmt: skip
def test_faults_of_pairs(write_lines, fields, reason):
    with pytest.raises(UserError, match=rf"train\.json:1: .*({reason})"):
        read(write_lines, fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": "q", "completion": "a", "label": "sports"}, "label is sports, expected true"),
        ({"prompt": "q", "completion": "a"}, "needed: label, or chosen and rejected"),
        ({"prompt": "q", "completion": "a", "label": 1, "kto_tag": 0}, "contradict each other"),
        (
            {"src": "q", "response": ["a"], "sort": [3]},
            r"sort of a single response is 3, expected 1 \(good\)",
        ),
    ],
)
def test_faults_of_marked_answers(write_lines, fields, reason):
    with pytest.raises(UserError, match=rf"train\.json:1: .*{reason}"):
        read(write_lines, fields, options=MARKED)


BEGUN = [Q, {"role": "assistant", "content": "The answer is"}]


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"prompt": BEGUN, "chosen": [A], "rejected": [B]}, PAIRS),
        ({"messages": BEGUN, "chosen": "a", "rejected": "b"}, PAIRS),
        ({"conversations": BEGUN, "chosen": A, "rejected": B}, PAIRS),
        ({"prompt": BEGUN, "chosen": [A], "rejected": [B]}, MARKED),
        ({"prompt": BEGUN, "completion": [A], "label": True}, MARKED),
    ],
)
def test_an_answer_that_the_prompt_begins_is_refused_and_counted(write_lines, fields, options):
    with pytest.raises(UserError, match=r"train\.json:1: .* ends with a message of the assistant"):
        read(write_lines, fields, options=options)
    faults = FaultCollector(skip=True)
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    found = read(write_lines, fields, good, options=options, faults=faults)
    assert len(found) == (1 if options is PAIRS else 2) and faults.num_faults == 1


def test_a_held_back_prompt_is_trained_on_with_no_answer(write_lines):
    file = write_lines(*[{"prompt": f"q{place}", "chosen": "a", "rejected": "b"} for place in range(10)])
    data = DataArguments(dataset_name_or_path=str(file), validation_split=3)
    sources = find_sources(data, training=True, evaluating=True)
    splits = read_splits(data, sources, seed=0, training=True, evaluating=True, comparison="marked")
    train, dev = ({each.messages[0].content for each in part} for part in (splits.train, splits.dev))
    assert (len(splits.train), len(splits.dev)) == (14, 6) and not train & dev


VALUES = st.sampled_from(
    [None, "", "x", "y", 1, 0, True, 2.5, [], {}, [Q, A], [Q, B], [Q], [A], A, B, Q, ["a", "b"], ["a"], [1, 0], [1], [None],
     "\n\nHuman: q\n\nAssistant: a", {"messages": [Q]}, {"role": "assistant"}, [[]], [{}], {"role": 3, "content": []}]
)  # fmt: skip
NAMES = ("prompt", "query", "chosen", "rejected", "rejected_response", "rejected_messages", "response", "sort", "src",
         "tgt", "messages", "conversations", "label", "margin", "system", "tools", "history", "output",
         "preferred_output", "non_preferred_output", "input")  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5),
    kind=st.sampled_from(["pairs", "marked"]),
)
def test_whatever_a_record_holds_is_read_or_a_fault(fields, kind):
    faults = FaultCollector(skip=True)
    found = list(convert([Record(Path("p.json"), 1, fields)], faults, ReadOptions(comparison=kind)))
    for conversation in found:
        assert (conversation.comparison.rejected is None) == (kind == "marked")
        assert conversation.messages[-1].role in (ASSISTANT, "tool_call")
    assert not (found and faults.num_faults)


def test_faulty_lines_are_told_together_or_skipped(write_lines):
    rows = [{"prompt": "q", "chosen": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q"}]
    with pytest.raises(UserError) as caught:
        read(write_lines, *rows)
    assert [fault.split(": ")[0][-2:] for fault in caught.value.faults] == [":1", ":3"]
    faults = FaultCollector(skip=True)
    assert len(read(write_lines, *rows, faults=faults)) == 1 and faults.num_faults == 2


def test_supervised_training_names_what_trains_on_pairs(write_lines):
    file = write_lines({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"})
    with pytest.raises(UserError, match="set loss_type to train on them"):
        read_conversations([file])
    (conversation,) = read_conversations([file], ReadOptions(preference="chosen"))
    assert [message.content for message in conversation.messages] == ["q", "a"]
