import json

import pytest

from finetune.data.reading.conversation import Message, Turn, make_conversation
from finetune.data.reading.formats import read_conversations, to_conversation
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.records import FaultCollector, Record
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from tests.texts import NUM_ROWS


def faults_of(file):
    with pytest.raises(UserError) as caught:
        read_conversations([file])
    return caught.value.faults


def test_strings_are_one_round(tmp_path):
    record = Record(tmp_path, 3, {"src": "问", "tgt": "答", "id": 5})
    conversation = to_conversation(record)
    assert conversation.turns == (Turn("问", "答"),)
    assert (conversation.system, conversation.file, conversation.line_number) == (None, tmp_path, 3)


def test_lists_are_rounds(tmp_path):
    conversation = to_conversation(Record(tmp_path, 1, {"src": ["a", "b"], "tgt": ["c", "d"]}))
    assert conversation.turns == (Turn("a", "c"), Turn("b", "d"))


@pytest.mark.parametrize(
    "extra", [{"system": "s"}, {"context": {"system": "s"}}, {"system": "s", "context": {"system": "t"}}]
)
def test_system_text(tmp_path, extra):
    assert to_conversation(Record(tmp_path, 1, {"src": "a", "tgt": "b", **extra})).system == "s"


@pytest.mark.parametrize("extra", [{}, {"system": None}, {"context": None}, {"context": {}}])
def test_no_system_text(tmp_path, extra):
    assert to_conversation(Record(tmp_path, 1, {"src": "a", "tgt": "b", **extra})).system is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"src": "a"}, "field 'tgt' is missing (fields present: 'src'; needed: src, tgt)"),
        (
            {"input": "a", "tgt": "b"},
            "field 'src' is missing (fields present: 'input', 'tgt'; needed: src, tgt)",
        ),
        ({}, "field 'src' is missing (fields present: none; needed: src, tgt)"),
        ({"src": "a", "tgt": None}, "tgt is null, expected a string or a list of strings"),
        ({"src": "a", "tgt": {"x": 1}}, "tgt is an object, expected a string or a list of strings"),
        ({"src": ["a", None], "tgt": ["b", "c"]}, "src[1] is null, expected a string"),
        ({"src": ["a"], "tgt": [["b"]]}, "tgt[0] is a list, expected a string"),
        ({"src": [], "tgt": []}, "src is an empty list, expected at least one round"),
        ({"src": ["a", "b"], "tgt": ["c"]}, "src has 2 entries and tgt has 1; each round needs one of both"),
        ({"src": ["a", "b"], "tgt": "c"}, "src has 2 entries and tgt has 1; each round needs one of both"),
        ({"src": "a", "tgt": "b", "system": [3]}, "system is a list, expected a string"),
    ],
)
def test_faulty_fields(write_lines, fields, reason):
    file = write_lines({"src": "a", "tgt": "b"}, fields)
    assert faults_of(file) == (f"{file}:2: {reason}: {json.dumps(fields, ensure_ascii=False)[:80]}",)


def test_excerpt_is_the_line_as_it_stands(write_lines):
    line = '{"src":   "' + "长" * 100 + '"}'
    assert faults_of(write_lines(line.encode()))[0].endswith(f"needed: src, tgt): {line[:80]}")


def test_faults_of_both_stages_in_file_order(write_lines):
    first = write_lines({"src": "a"}, b"broken", {"src": "a", "tgt": "b"}, name="1.json")
    second = write_lines(b"\xff", {"src": "a", "tgt": {}}, name="2.json")
    with pytest.raises(UserError) as caught:
        read_conversations([first, second])
    starts = [f.split(" (")[0].split(", ")[0] for f in caught.value.faults]
    assert starts == [
        f"{first}:1: field 'tgt' is missing",
        f"{first}:2: not JSON",
        f"{second}:1: not UTF-8",
        f"{second}:2: tgt is an object",
    ]


def test_count_of_the_rest_covers_both_stages(write_lines):
    file = write_lines(*[b"broken", {"src": "a"}] * 15)
    assert faults_of(file)[-1] == "... and 10 more faulty lines."


def test_duplicates_are_kept(write_lines):
    line = {"src": "a", "tgt": "b"}
    assert len(read_conversations([write_lines(line, line)])) == 2


# --- formats ---


THE_SAME = {
    "src_tgt": {"src": ["一", "二"], "tgt": ["1", "2"], "system": "数"},
    "alpaca": {"instruction": "二", "input": "", "output": "2", "history": [["一", "1"]], "system": "数"},
    "query_response": {"query": "二", "response": "2", "history": [["一", "1"]], "system": "数"},
    "messages": {
        "type": "chatml",
        "messages": [
            {"role": "system", "content": "数"},
            {"role": "user", "content": "一"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "二"},
            {"role": "assistant", "content": "2"},
        ],
        "source": "here",
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "一"},
            {"from": "gpt", "value": "1"},
            {"from": "human", "value": "二"},
            {"from": "gpt", "value": "2"},
        ],
        "system": "数",
    },
    "preference": {
        "conversations": [
            {"from": "system", "value": "数"},
            {"from": "human", "value": "一"},
            {"from": "gpt", "value": "1"},
            {"from": "human", "value": "二"},
        ],
        "chosen": {"from": "gpt", "value": "2"},
        "rejected": {"from": "gpt", "value": "3"},
    },
}
CHOSEN = ReadOptions(preference="chosen")


@pytest.mark.parametrize("name", THE_SAME)
@pytest.mark.parametrize("as_array", [False, True])
def test_the_same_conversation_in_every_format(tmp_path, name, as_array):
    file = tmp_path / "train.json"
    row = json.dumps(THE_SAME[name], ensure_ascii=False, indent=1 if as_array else None)
    file.write_text(f"[\n{row},\n{row}\n]\n" if as_array else f"{row}\n{row}\n", encoding="utf-8")
    read = read_conversations([file], CHOSEN)
    assert read == [make_conversation([("一", "1"), ("二", "2")], "数")] * 2
    assert read == read_conversations([file], ReadOptions(preference="chosen", dataset_format=name))
    assert read[0].line_number == (2 if as_array else 1)


@pytest.mark.parametrize(
    "header,row",
    [
        ("src,tgt", '"a, b","c\nd"'),
        ("instruction,input,output,history", '"a, b",,"c\nd",'),
        ("query,response,system", '"a, b","c\nd",'),
    ],
)
def test_csv(tmp_path, header, row):
    file = tmp_path / "train.csv"
    file.write_bytes(f"\ufeff{header}\r\n\r\n{row}\r\n{row}\r\n".encode())
    first, second = read_conversations([file])
    assert first.turns == second.turns == (Turn("a, b", "c\nd"),)
    assert (first.line_number, second.line_number) == (3, 5)


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"instruction": "do", "input": "this"}, "do\nthis"),
        ({"instruction": "do", "input": None}, "do"),
        ({"instruction": "", "input": "this"}, "this"),
        ({"instruction": "do"}, "do"),
    ],
)
def test_alpaca_input(tmp_path, fields, prompt):
    assert to_conversation(Record(tmp_path, 1, {**fields, "output": "b"}), "alpaca").turns == (
        Turn(prompt, "b"),
    )


@pytest.mark.parametrize("name", ["text", "tgt", "response"])
def test_running_text(write_lines, name):
    (read,) = read_conversations([write_lines({name: "once", "meta": {"url": "x"}})])
    assert read.is_text and read.messages == (Message("text", "once"),)


def test_first_record_that_lacks_its_prompt_does_not_make_a_file_text(write_lines):
    file = write_lines({"tgt": "b"}, {"src": "a", "tgt": "b"})
    assert faults_of(file) == (
        f"{file}:1: field 'src' is missing (fields present: 'tgt'; needed: src, tgt): {{\"tgt\": \"b\"}}",
    )


def test_prompt_in_a_file_of_text_is_a_fault(write_lines):
    file = write_lines(*[{"tgt": "b"}] * 20, {"src": "a", "tgt": "b"})
    (fault,) = faults_of(file)
    assert fault.startswith(f"{file}:21: field 'src' is a prompt, but the first lines of the file have none")


def test_unknown_format_lists_the_known_ones(write_lines):
    file = write_lines({"frage": "a", "antwort": "b"})
    (fault,) = faults_of(file)
    assert fault.startswith(
        f"{file}:1: no known format (fields present: 'frage', 'antwort'; the formats need src+tgt"
    )


def test_preference_pairs_are_refused_unless_chosen_is_asked_for(write_lines):
    file = write_lines({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert (
        "preference pairs (chosen and rejected), the data of a preference method such as DPO: set loss_type to train on them"
        in faults_of(file)[0]
    )
    assert read_conversations([file], CHOSEN) == [make_conversation([("a", "b")])]


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "a", "input": "", "chosen": "b"},
        {"messages": [{"role": "user", "content": "a"}], "chosen": {"role": "assistant", "content": "b"}},
        {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}]},
        {"src": "a", "chosen": "b", "system": None},
    ],
)
def test_shapes_of_preference_pairs(write_lines, fields):
    read = read_conversations([write_lines({**fields, "rejected": "c"})], CHOSEN)
    assert read == [make_conversation([("a", "b")])]


def test_tool_calls_in_both_spellings(write_lines):
    call = {"name": "t", "arguments": {"x": 1}}
    sharegpt = write_lines(
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": json.dumps(call)},
                {"from": "observation", "value": "r"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": '[{"name": "t"}]',
        },
        name="1.json",
    )
    openai = write_lines(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {**call, "arguments": '{"x": 1}'}}],
                },
                {"role": "tool", "content": "r"},
                {"role": "assistant", "content": "a"},
            ],
            "tools": [{"name": "t"}],
        },
        name="2.json",
    )
    (first,), (second,) = read_conversations([sharegpt]), read_conversations([openai])
    assert first == second
    assert [message.role for message in first.messages] == ["user", "tool_call", "tool", "assistant"]
    assert first.tools == '[{"name": "t"}]' and first.num_rounds == 1


def test_results_of_several_tools_are_one_message(write_lines):
    roles = ["user", "assistant", "tool_call", "tool", "tool", "assistant"]
    rows = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    (read,) = read_conversations([write_lines({"messages": rows})])
    assert [m.role for m in read.messages] == ["user", "tool_call", "tool", "assistant"]
    assert [m.content for m in read.messages] == ["0", "1\n2", "3\n4", "5"]


U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": "a"}, "messages is a string, expected a list of messages"),
        ({"messages": []}, "messages holds no message, expected an answer to learn at the end"),
        ({"messages": [U]}, "messages ends with a message from user, expected an answer"),
        ({"messages": [A, A]}, "messages holds no message, expected an answer to learn"),
        ({"messages": [U, {"role": "tool", "content": "t"}, A]}, "messages[1] is from tool, expected assistant"),
        ({"messages": [U, 5]}, "messages[1] is a number, expected an object"),
        ({"messages": [U, {"role": "robot", "content": "b"}]}, 'messages[1]: the role is "robot", expected one of user'),
        ({"messages": [U, {"content": "b"}]}, "messages[1]: the role is missing"),
        ({"messages": [U, {"role": ["user"]}]}, 'messages[1]: the role is ["user"], expected'),
        ({"messages": [U, {"role": "assistant"}]}, "messages[1].content is missing, expected a string"),
        ({"messages": [U, {"role": "assistant", "content": {}}]}, "messages[1].content is an object, expected a string"),
        ({"messages": [U, {"role": "assistant", "content": [{"type": "image"}]}]}, "has parts that are no text"),
        ({"messages": [U, A], "tools": 5}, "tools is a number, expected a list or JSON text"),
        ({"messages": [U, A], "system": {}}, "system is an object, expected a string"),
        ({"instruction": "a", "output": None}, "output is null, expected a string"),
        ({"instruction": "a", "output": "b", "input": {}}, "input is an object, expected a string"),
        ({"instruction": "a", "output": "b", "history": "x"}, "history is a text that is no list: write it as JSON"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0] is no pair of strings"),
        ({"query": "a"}, "field 'response' is missing (fields present: 'query'; needed: query, response)"),
        ({"text": []}, "text is a list, expected a string"),
        ({"chosen": None, "rejected": "c", "prompt": "a"}, "chosen is null, expected a string"),
        ({"chosen": "b", "rejected": "c"}, "field 'prompt' is missing"),
    ],
)  # fmt: skip
def test_faulty_fields_of_other_formats(write_lines, fields, reason):
    with pytest.raises(UserError) as caught:
        read_conversations([write_lines(fields)], CHOSEN)
    assert "train.json:1: " in str(caught.value) and reason in str(caught.value)


def test_named_format_is_not_recognised(write_lines):
    with pytest.raises(UserError, match="field 'instruction' is missing"):
        read_conversations([write_lines({"src": "a", "tgt": "b"})], ReadOptions(dataset_format="alpaca"))


def test_faulty_lines_are_skipped_and_counted(write_lines):
    good = {"src": "a", "tgt": "b"}
    file = write_lines(b"broken", good, {"src": "a"}, good, b"\xff", {"src": {}, "tgt": "b"})
    faults = FaultCollector(skip=True)
    assert len(read_conversations([file], faults=faults)) == 2
    assert faults.num_faults == 4 and faults.messages[0].startswith(f"{file}:1: not JSON")


@pytest.mark.parametrize("name", NUM_ROWS)
def test_data_sets_of_other_tools_read_and_render(data_sets, name):
    file = data_sets[name]
    read = read_conversations([file], CHOSEN)
    assert len(read) == NUM_ROWS[name]
    template = load_template("qwen")
    for conversation in read:
        if not conversation.is_text:
            pieces = template.render(conversation)
            learned = [piece.text for piece in pieces if piece.learned and not piece.special]
            assert learned == [turn.response for turn in conversation.turns if turn.response]
    if name == "preferences.json":
        with pytest.raises(UserError, match=r"preferences\.json:1: these are preference pairs"):
            read_conversations([file])
