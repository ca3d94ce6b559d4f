import json
import subprocess
import sys

import pytest

from finetune.data.templates.template import JsonTemplate, Piece, PlainTemplate, load_template
from finetune.errors import UserError

PARTS = {
    "system": "<s>系统{{system}}\n",
    "conversation": ["[{{index}}{% if is_last %}!{% endif %}] 问：{{user}}\n", "答：{{bot}}</s>\n"],
    "query": "[{{index}}?] 问：{{query}}\n答：",
}


@pytest.fixture
def template_file(tmp_path):
    def write(parts):
        file = tmp_path / "chat_template.json"
        file.write_text(parts if isinstance(parts, str) else json.dumps(parts), encoding="utf-8")
        return file

    return write


def texts(pieces):
    return [(piece.text, piece.learned) for piece in pieces]


@pytest.mark.parametrize("name", [None, "none", "plain"])
def test_no_template(name, conversation):
    template = load_template(name, None)
    assert isinstance(template, PlainTemplate)
    two_rounds = conversation(("a", "b"), ("c", "d"))
    assert template.render(two_rounds) == [
        Piece("a", False),
        Piece("b", True),
        Piece("c", False),
        Piece("d", True),
    ]
    assert template.render_prompt(two_rounds) == [Piece("a", False), Piece("b", True), Piece("c", False)]


def test_plain_puts_system_text_first(conversation):
    assert texts(PlainTemplate().render(conversation(("a", "b"), system="s"))) == [
        ("s", False),
        ("a", False),
        ("b", True),
    ]


def test_json_template(template_file, conversation):
    template = load_template(template_file(PARTS))
    two_rounds = conversation(("甲", "乙"), ("丙", "丁"), system="好")
    assert texts(template.render(two_rounds)) == [
        ("<s>系统好\n", False),
        ("[0] 问：甲\n", False),
        ("答：乙</s>\n", True),
        ("[1!] 问：丙\n", False),
        ("答：丁</s>\n", True),
    ]
    assert texts(template.render_prompt(two_rounds)) == [
        ("<s>系统好\n", False),
        ("[0] 问：甲\n", False),
        ("答：乙</s>\n", True),
        ("[1?] 问：丙\n答：", False),
    ]
    assert [piece.data for piece in template.render(two_rounds)] == ["好", "甲", "乙", "丙", "丁"]


def test_json_template_without_query_uses_the_user_part(conversation):
    template = JsonTemplate({"conversation": ["U{{user}}", "{{bot}}"], "query": None}, "t")
    assert texts(template.render_prompt(conversation(("a", "b")))) == [("Ua", False)]


def test_is_training_tells_training_from_generation(conversation):
    template = JsonTemplate({"conversation": ["{{user}}{{is_training}}{{length}}", "{{bot}}"]}, "t")
    assert template.render(conversation(("a", "b")))[0].text == "aTrue1"
    assert template.render_prompt(conversation(("a", "b")))[0].text == "aFalse1"


def test_empty_system_part_gives_no_piece(conversation):
    template = JsonTemplate({"system": "{{system}}", "conversation": ["{{user}}", "{{bot}}"]}, "t")
    assert len(template.render(conversation(("a", "b")))) == 2


@pytest.mark.parametrize(
    ("bot", "appends_eos"),
    [("{{bot}}", True), ("A: {{bot}}\n\n", True), ("{{bot}}</s>", False), ("{{bot}}<|im_end|>\n", False)],
)
def test_end_mark_is_left_to_a_template_that_has_one(bot, appends_eos):
    assert JsonTemplate({"conversation": ["{{user}}", bot]}, "t").appends_eos is appends_eos


def test_path_is_looked_up_in_the_tokenizer_folder_too(tmp_path, template_file):
    template_file(PARTS)
    assert isinstance(load_template("chat_template.json", tmp_path), JsonTemplate)


def test_unknown_name_lists_what_is_accepted():
    with pytest.raises(UserError) as caught:
        load_template("lama2", None)
    message = str(caught.value)
    assert (
        "'lama2' is not known (did you mean 'llama2' or 'llama3.2' or 'llama3'?). Accepted: null (the model's own for conversations), 'none', 'plain' (no template), "
        in message
    )
    assert ", llama2, " in message
    assert '"conversation": ["{{user}} ...", "{{bot}} ..."]' in message


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("{", "chat_template.json is no valid JSON"),
        ("[1]", "holds no JSON object but a list: put the keys system, conversation, query there"),
        ({}, "conversation must be a list of two strings, the user part and the bot part"),
        ({"conversation": ["a"]}, r'conversation must be a list of two strings.*not \["a"\]'),
        (
            {"conversation": ["a", "b"], "sytem": ""},
            "unknown key 'sytem', allowed: system, conversation, query",
        ),
        ({"conversation": ["a", "b"], "system": 3}, "system must be a string or null"),
        ({"conversation": ["{{user", "{{bot}}"]}, r"the user part is no valid jinja \(line 1: "),
    ],
)
def test_faulty_file(template_file, parts, message):
    with pytest.raises(UserError, match=message):
        load_template(template_file(parts))


def test_all_faults_of_a_file_at_once():
    with pytest.raises(UserError) as caught:
        JsonTemplate({"conversation": 1, "query": 2, "x": 3}, "t")
    assert len(caught.value.faults) == 3


def test_failure_on_an_example_names_the_line(conversation):
    template = JsonTemplate(
        {"conversation": ["{{user}}", "{{bot}}"], "query": "{{ raise_exception('no') }}"}, "t.json"
    )
    with pytest.raises(UserError, match=r"t\.json: the query part fails on train\.json:7: no\."):
        template.render_prompt(conversation(("a", "b")))


def test_template_cannot_reach_the_interpreter():
    with pytest.raises(UserError, match=r"the bot part fails on a trial round: .*unsafe"):
        JsonTemplate({"conversation": ["{{user}}", "{{ bot.__class__.__mro__ }}"]}, "t")


def test_no_module_of_the_data_path_imports_paddle():
    modules = ["reading.splits", "reading.formats", "templates.template", "samples.tokenize", "samples.dataset",
               "batches.sampler", "batches.collate"]  # fmt: skip
    code = "import sys\n" + "".join(f"import finetune.data.{m}\n" for m in modules)
    code += "print([m for m in sys.modules if m.split('.')[0] in ('paddle', 'paddlenlp')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
