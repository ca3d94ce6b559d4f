"""A folder with several templates by name: which of them writes what, and where they go along."""

from __future__ import annotations

import json

import pytest

from finetune.checkpoints.companions import copy_companions
from finetune.data.reading.conversation import Conversation, Message, make_conversation
from finetune.data.templates.template import load_template
from finetune.data.templates.trained_template import (
    RECORD_FILE,
    carry_template,
    template_source,
    trained_template,
)
from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.merge.hf_out import write_tokenizer_files

TALK = make_conversation([("q", "a")])
WITH_TOOLS = Conversation((Message("user", "q"), Message("assistant", "a")), tools='[{"name": "f"}]')


def source(letter):
    return "{% for m in messages %}" + letter + "{{ m.content }}{% endfor %}"


def text_of(name, folder, conversation=TALK):
    return "".join(piece.text for piece in load_template(name, folder).render(conversation))


def lay_out(folder, form, names):
    """Templates by name, in one of the forms that transformers writes; each puts its first letter before a text."""
    if form == "files":
        (folder / "additional_chat_templates").mkdir(parents=True)
        for name in names:
            inside = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (folder / inside).write_text(source(name[0]))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source("X")}))
        return folder
    listed = [{"name": name, "template": source(name[0])} for name in names]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    return folder


@pytest.fixture(params=["files", "list"])
def folder(request, tmp_path):
    return lay_out(tmp_path, request.param, ["default", "tool_use", "rag"])


def test_the_default_one_writes_what_has_no_tools(folder):
    for name in (None, "tokenizer"):
        assert text_of(name, folder) == "dqda"
        assert text_of(name, folder, WITH_TOOLS).startswith("tThese functions")


def test_a_name_chooses(folder):
    assert text_of("rag", folder) == "rqra"
    assert text_of("tool_use", folder) == "tqta"
    with pytest.raises(
        UserError, match=r"'wrong' is not known.*the tokenizer's own: default, (rag|tool_use)"
    ):
        load_template("wrong", folder)


@pytest.mark.parametrize("form", ["files", "list"])
def test_without_a_default_one_the_names_are_told(tmp_path, form):
    lay_out(tmp_path, form, ["rag", "tool_use"])
    with pytest.raises(
        UserError, match="no default template; set chat_template to one of its names: rag, tool_use"
    ):
        load_template("tokenizer", tmp_path)
    with pytest.raises(UserError, match="set chat_template to none for plain text"):
        text_of(None, tmp_path)
    assert text_of("rag", tmp_path) == "rqra"


def test_one_that_was_trained_goes_along(folder, tmp_path):
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir()
    target.mkdir()
    (run / "arguments.json").write_text(json.dumps({"chat_template": "rag"}))
    assert carry_template([run, folder], target) == "rag"
    assert text_of(trained_template(target), target) == "rqra"
    assert template_source(target, get_family("llama").tokenizer) == source("r")


def test_all_go_along_with_a_model(folder, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    copy_companions(folder, target)
    assert text_of("rag", target) == "rqra" and text_of(None, target, WITH_TOOLS).startswith(
        "tThese functions"
    )


def test_transformers_finds_the_trained_one_first_and_the_others_by_name(folder, tmp_path):
    (folder / RECORD_FILE).write_text(json.dumps({"chat_template": "rag"}))
    write_tokenizer_files(folder, get_family("llama"))
    assert (folder / "chat_template.jinja").read_text() == source("r")
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == source("t")
