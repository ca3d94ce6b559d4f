"""Prompts and answers under the names that other tools and data sets have for them."""

import json

import pytest

from finetune.data.reading.conversation import TEXT, Message, make_conversation
from finetune.data.reading.formats import read_conversations
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.records import FaultCollector
from finetune.errors import UserError

ROUND = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ONE_ROUND = [make_conversation([("问", "答")])]


def read(file, **options):
    faults = FaultCollector()
    return read_conversations([file], ReadOptions(**options), faults), faults.notes


@pytest.mark.parametrize(
    "names",
    [
        ("prompt", "response"),
        ("prompt", "completion"),
        ("question", "answer"),
        ("query", "response"),
        ("query", "answer"),
        ("instruction", "output"),
        ("instruction", "response"),
        ("input", "output"),
        ("input", "target"),
        ("content", "summary"),
        ("document", "summary"),
        ("source", "target"),
        ("src", "tgt"),
    ],
)
def test_two_fields(write_lines, names):
    file = write_lines(dict(zip(names, ("问", "答"), strict=True)))
    assert read(file)[0] == ONE_ROUND


@pytest.mark.parametrize(
    ("fields", "prompt", "rule"),
    [
        ({"prompt": "a", "query": "b", "response": "c"}, "a\nb", None),
        ({"instruction": "a", "input": "b", "output": "c"}, "a\nb", None),
        ({"instruction": "a", "context": "b", "response": "c"}, "a\nb", None),
        (
            {"instruction": "a", "query": "b", "response": "c"},
            "a\nb",
            "prompts made of instruction and query",
        ),
        (
            {"question": "b", "instruction": "a", "answer": "c"},
            "a\nb",
            "prompts made of instruction and question",
        ),
        ({"instruction": "a", "query": None, "response": "c"}, "a", "prompts made of instruction and query"),
    ],
)
def test_what_stands_in_several_fields_is_one_prompt(write_lines, fields, prompt, rule):
    (conversation,), notes = read(write_lines(fields))
    assert conversation == make_conversation([(prompt, "c")])
    assert list(notes.rules) == ([rule] if rule else [])


@pytest.mark.parametrize("prompt", [None, "", {"missing": True}])
def test_an_answer_without_a_prompt_is_running_text(write_lines, prompt):
    fields = {"response": "a"} if isinstance(prompt, dict) else {"query": prompt, "response": "a"}
    (conversation,), _ = read(write_lines(fields))
    assert conversation.messages == (Message(TEXT, "a"),)


def test_a_prompt_that_is_null_in_the_first_line_alone_does_not_change_the_others(write_lines):
    file = write_lines({"query": None, "response": "a"}, {"query": "b", "response": "c"})
    first, second = read(file)[0]
    assert first.is_text and second == make_conversation([("b", "c")])


def test_a_system_text_alone_keeps_an_example_a_conversation(write_lines):
    (conversation,), _ = read(write_lines({"system": "s", "query": "", "response": "a"}))
    assert conversation == make_conversation([("", "a")], "s")


@pytest.mark.parametrize(
    ("value", "text"), [(2, "2"), (3.5, "3.5"), (True, "true"), (False, "false"), (10**20, str(10**20))]
)
@pytest.mark.parametrize(
    "make",
    [
        lambda value: {"query": "问", "response": value},
        lambda value: {"src": ["问"], "tgt": [value]},
        lambda value: {
            "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": value}]
        },
    ],
)
def test_numbers_and_booleans_are_text_and_counted(write_lines, make, value, text):
    (conversation,), notes = read(write_lines(make(value)))
    assert conversation == make_conversation([("问", text)])
    assert notes.rules == {"numbers read as text": 1}


EARLIER = [("q1", "a1"), ("q2", "a2")]


@pytest.mark.parametrize(
    "history",
    [
        [["q1", "a1"], ["q2", "a2"]],
        json.dumps([["q1", "a1"], ["q2", "a2"]]),
        "[['q1', 'a1'], ['q2', 'a2']]",
        "[('q1', 'a1'), ('q2', 'a2')]",
        [{"user": "q1", "assistant": "a1"}, {"query": "q2", "response": "a2"}],
        ["q1", "a1", "q2", "a2"],
        [["q1", "a1"], [None, "greeting"], ["unanswered", None], ["q2", "a2"]],
    ],
)
def test_histories(write_lines, history):
    (conversation,), notes = read(write_lines({"query": "q3", "response": "a3", "history": history}))
    assert conversation == make_conversation([*EARLIER, ("q3", "a3")])
    gaps = sum(None in pair for pair in history if isinstance(pair, list))
    assert sum(notes.rules.values()) == (1 if isinstance(history, str) else gaps)


@pytest.mark.parametrize("history", [None, "", [], "[]"])
def test_no_history(write_lines, history):
    assert read(write_lines({"query": "问", "response": "答", "history": history}))[0] == ONE_ROUND


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        ("hello", "history is a text that is no list: write it as JSON"),
        ("[" * 5000, "history is a text that is no list"),
        ("__import__('os').getcwd()", "history is a text that is no list"),
        ({"a": 1}, "history is an object, expected a list of pairs"),
        ([["q", "a", "b"]], "history[0] is no pair of strings (a prompt and its answer): write [["),
        ([["q", ["a"]]], "history[0][1] is a list, expected a string"),
    ],
)
def test_faulty_histories(write_lines, history, reason):
    with pytest.raises(UserError) as caught:
        read(write_lines({"query": "q", "response": "a", "history": history}))
    assert f"train.json:1: {reason}" in str(caught.value)


@pytest.mark.parametrize(
    "conversation",
    [
        [{"human": "q1", "assistant": "a1"}, {"human": "q2", "assistant": "a2"}],
        [{"system": "s", "input": "q1", "output": "a1"}, {"input": "q2", "output": "a2"}],
    ],
)
def test_rounds_as_objects(write_lines, conversation):
    system = conversation[0].get("system")
    file = write_lines({"conversation": conversation})
    assert read(file)[0] == [make_conversation(EARLIER, system)]


def test_messages_as_json_text_in_a_table(tmp_path):
    file = tmp_path / "train.tsv"
    messages = '[{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]'
    file.write_text(f'id\tmessages\n1\t"{messages.replace(chr(34), chr(34) * 2)}"\n', encoding="utf-8")
    read_rows, notes = read(file)
    assert read_rows == ONE_ROUND and notes.unused_fields == {"id": 1}


def test_prompt_and_completion_as_lists_of_messages(write_lines):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "问"}]
    file = write_lines({"prompt": prompt, "completion": [{"role": "assistant", "content": "答"}]})
    assert read(file)[0] == [make_conversation([("问", "答")], "s")]


@pytest.mark.parametrize(
    "fields",
    [
        {"query": "q", "response": "a"},
        {"src": "q", "tgt": "a"},
        {"text": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_fields_that_are_not_used_are_named_with_their_counts(write_lines, fields):
    file = write_lines(
        {**fields, "images": ["a.png"]}, {**fields, "images": [], "url": "x"}, {**fields, "url": None}
    )
    _, notes = read(file)
    assert notes.unused_fields == {"images": 1, "url": 1}
    assert notes.describe() == ["fields not used: images (1), url (1)"]


def test_parts_of_messages_and_of_the_context_are_named_too(write_lines):
    messages = [
        {"role": "user", "content": "q", "time": 3},
        {"role": "assistant", "content": "a", "rating": 5},
    ]
    assert read(write_lines({"messages": messages}))[1].unused_fields == {
        "messages[].time": 1,
        "messages[].rating": 1,
    }
    file = write_lines({"src": "q", "tgt": "a", "context": {"system": "s", "bot": "Paddy"}})
    assert read(file)[1].unused_fields == {"context.bot": 1}


@pytest.mark.parametrize(
    ("fields", "system", "lost"),
    [
        ({"query": "q", "response": "a", "system": "s", "system_prompt": "t"}, "s", "system_prompt"),
        ({"query": "q", "response": "a", "system": None, "system_prompt": "t"}, "t", None),
        ({"messages": [{"role": "system", "content": "s"}, *ROUND], "system": "t"}, "s", "system"),
        ({"messages": [{"role": "system", "content": "s"}, *ROUND], "system": "s"}, "s", None),
        ({"src": "q", "tgt": "a", "system": "s", "context": {"system": "t"}}, "s", "context.system"),
        ({"src": "q", "tgt": "a", "system": None, "context": {"system": "t"}}, "t", None),
    ],
)
def test_of_two_system_texts_the_one_that_is_lost_is_named(write_lines, fields, system, lost):
    (conversation,), notes = read(write_lines(fields))
    assert conversation.system == system and notes.unused_fields == ({lost: 1} if lost else {})


@pytest.mark.parametrize(
    ("extra", "lost"),
    [
        ({"value": "x"}, "value"),
        ({"from": "web"}, "from"),
        ({"thinking": ["x"]}, "thinking"),
        ({"value": None}, None),
    ],
)
def test_a_second_text_of_a_message_is_named(write_lines, extra, lost):
    (conversation,), notes = read(write_lines({"messages": [ROUND[0], {**ROUND[1], **extra}]}))
    assert conversation.messages[1] == Message("assistant", "a")
    assert notes.unused_fields == ({f"messages[].{lost}": 1} if lost else {})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stays_with_its_answer(write_lines, key):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: "because"}]
    (conversation,), notes = read(write_lines({"messages": messages}))
    assert conversation.messages[1] == Message("assistant", "a", True, "because")
    assert not notes.rules and not notes.unused_fields


# --- columns and tags ---


def test_a_map_of_columns(write_lines):
    file = write_lines({"ques": "问", "ans": "答", "prompt": "another", "past": [["q1", "a1"]]})
    columns = {"prompt": "ques", "response": "ans", "history": "past", "query": "extra"}
    assert read(file, columns=columns)[0] == [make_conversation([("q1", "a1"), ("问", "答")])]


def test_a_mapped_field_that_is_missing_is_a_fault(write_lines):
    with pytest.raises(
        UserError, match=r":2: columns names 'ans' for response, which is missing .*'ques', 'b'"
    ):
        read(
            write_lines({"ques": "q", "ans": "a"}, {"ques": "q", "b": 1}),
            columns={"prompt": "ques", "response": "ans"},
        )


@pytest.mark.parametrize(("name", "column"), [("text", "body"), ("messages", "dialog"), ("src", "从")])
def test_other_formats_are_recognised_by_their_mapped_names(write_lines, name, column):
    values = {
        "text": "答",
        "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
        "src": "问",
    }
    file = write_lines({column: values[name], "tgt": "答"} if name == "src" else {column: values[name]})
    (conversation,), _ = read(file, columns={name: column})
    assert conversation.turns[0].response == "答"


def test_tags_of_messages(write_lines):
    rows = [{"speaker": "顾客", "said": "问"}, {"speaker": "店员", "said": "答"}]
    tags = {"role_tag": "speaker", "content_tag": "said", "user_tag": "顾客", "assistant_tag": "店员"}
    file = write_lines({"dialog": rows})
    assert read(file, columns={"messages": "dialog"}, tags=tags)[0] == ONE_ROUND
