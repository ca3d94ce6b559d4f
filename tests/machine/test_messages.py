"""Messages in the language of the person: what is looked up, what stays, and how it fits a terminal."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest

from finetune.machine.language import translation
from finetune.machine.language.catalogue import Catalogue
from finetune.machine.language.choice import language
from finetune.machine.language.columns import count_columns, pad, wrap
from finetune.machine.language.translation import MESSAGES_FILE, PIECES_FILE, translate
from finetune.machine.screen import format_for
from tests.conftest import ROOT
from tools.message_templates import LABELS, find_templates

MESSAGES = json.loads(MESSAGES_FILE.read_text(encoding="utf-8"))
PIECES = json.loads(PIECES_FILE.read_text(encoding="utf-8"))
CATALOGUE = Catalogue(
    {
        "error:": "错误：",
        "{} is {}: choose {}": "{0} 是 {1}：请选 {2}",
        "{} is {}: choose one of {}": "{0} 是 {1}：请从 {2} 中选一个",
        "nothing to do": "无事可做",
        " (as before)": "（同前）",
        "{} of {} are missing": "{1} 中缺少 {0}",
    },
    {"loss {}": "损失 {0}", "step {}": "步 {0}"},
)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("nothing to do", "无事可做"),
        ("error: nothing to do", "错误：无事可做"),
        ("a is 3: choose 4", "a 是 3：请选 4"),
        ("error: a is 3: choose 4", "错误：a 是 3：请选 4"),
        ("a is 3: choose one of 4, 5", "a 是 3：请从 4, 5 中选一个"),
        ("2 of 3 are missing", "3 中缺少 2"),
        ("a is nothing to do: choose b", "a 是 无事可做：请选 b"),
        ("a is 1: choose 2; nothing to do", "a 是 1：请选 2; 无事可做"),
        ("step 1/3  loss 2.5", "步 1/3    损失 2.5"),
        ("a is b: choose c (as before)", "a 是 b：请选 c（同前）"),
        ("  nothing to do\nelse", "  无事可做\nelse"),
        ("loss of face", "loss of face"),
        ("a is loss 3: choose 1", "a 是 loss 3：请选 1"),
        ("what nobody translated: {}", "what nobody translated: {}"),
        ("", ""),
    ],
)
def test_a_message_is_found_by_what_stands_in_it(text, shown):
    assert CATALOGUE.translate(text) == shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ('file "nothing to do" is gone', "文件“nothing to do”不见了"),
        ("'nothing to do' is 3: choose 4", "'nothing to do' 是 3：请选 4"),
        ("kept text is 3: choose 4", "kept text 是 3：请选 4"),
        ("  2 of 3 are missing", "  3 中缺少 2"),
        ("loss of a sample", "loss of a sample"),
        ("3 samples", "3 个样本"),
        ("step 1/3  epoch 0.1  loss 2.5  2s left", "步 1/3    轮次 0.1   损失 2.5  剩余 2s"),
        ("3 checkpoints is 3 samples: choose 4", "3 个检查点 是 3 个样本：请选 4"),
        ("118 tokens, 86 learned", "118 个 token，其中学习 86 个"),
        ("3 kinds of samples", "3 kinds of samples"),
        ("2m 3s left", "剩余 2m 3s"),
        ("Trained ./a", "已训练 ./a"),
        ("  for a batch of 3", "  每批 3"),
        ("kinds of samples", "kinds of samples"),
    ],
)
def test_names_stay_and_short_pieces_stand_around_numbers(text, shown):
    messages = {
        'file "{}" is gone': "文件“{0}”不见了",
        "{} is {}: choose {}": "{0} 是 {1}：请选 {2}",
        "nothing to do": "无事可做",
        "kept text": "留下的",
        "  for a batch of {}": "  每批 {0}",
        "{} of {} are missing": "{1} 中缺少 {0}",
    }
    catalogue = Catalogue(messages, PIECES, {"kept text"})
    assert catalogue.translate_piece(text) == shown


@pytest.mark.parametrize(
    "value",
    [
        "warning: Data",
        "the CPU; note: x",
        "not tried",
        "does not exist",
        "a  Memory",
        "step 3",
        "3 samples",
        "空  no adapter",
    ],
)
def test_what_a_person_gave_stays(value, monkeypatch):
    monkeypatch.setenv("FINETUNE_LANG", "zh")
    monkeypatch.setattr(translation, "_kept", set())
    monkeypatch.setattr(translation, "chinese", lambda: Catalogue(MESSAGES, PIECES, translation._kept))
    translation.keep_values({"path": [value]})
    for message in (
        "argument file {} does not exist (looked in /a): check the path",
        'model_name_or_path is "{}", which does not exist (looked in /a): check the path',
    ):
        shown = translation.translate_piece(message.format(value))
        assert value in shown
        assert "检查路径" in shown


def test_braces_of_a_value_stay():
    assert CATALOGUE.translate("{0} is {1}: choose {}") == "{0} 是 {1}：请选 {}"


def test_a_long_message_takes_no_time():
    text = "x is " * 20_000 + "y"
    assert CATALOGUE.translate(text) == text


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "zh_TW", "FINETUNE_LANG": "en"}, "en"),
        ({"LANG": "de_DE", "FINETUNE_LANG": "ZH"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"FINETUNE_LANG": "", "LC_MESSAGES": "zh"}, "zh"),
    ],
)
def test_the_language_follows_the_locale(variables, expected, monkeypatch):
    for name in ("FINETUNE_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language() == expected


def test_chinese_takes_two_columns():
    assert count_columns("步 3") == 4
    assert pad("步", 4) == "步  "


def test_lines_break_between_characters_but_not_in_words():
    text = "学习率 learning_rate 必须大于零，请给出更大的值。"
    lines = wrap(text, 16).split("\n")
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(count_columns(line) <= 16 for line in lines)
    assert any("learning_rate" in line for line in lines)
    assert not any(line[0] in "，。" for line in lines)


@pytest.mark.parametrize("table", [MESSAGES, PIECES], ids=["messages", "pieces"])
def test_translations_take_the_values_of_their_message(table):
    wrong = {
        template: text
        for template, text in table.items()
        if not {int(number) for number in re.findall(r"\{(\d+)\}", text)} <= set(range(template.count("{}")))
    }
    assert wrong == {}


def test_every_translation_belongs_to_a_message_of_the_code():
    assert set(MESSAGES) - set(find_templates()) - LABELS == set(), "tools/message_templates.py --prune"


def test_every_message_that_is_shown_as_it_stands_has_a_translation():
    shown = {template for template, (_, is_shown) in find_templates().items() if is_shown}
    assert len(shown) > 600
    assert shown - set(MESSAGES) == set(), "translate them and use tools/message_templates.py --add"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_label_keeps_its_colour(monkeypatch):
    monkeypatch.setenv("FINETUNE_LANG", "zh")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert format_for("error: /a/b", Terminal()) == "\033[1;31m错误：\033[0m/a/b"
    assert translate("warning: x") == "警告：x"


@pytest.mark.parametrize("lang, label", [("zh", "错误："), ("en", "error: ")])
def test_a_command_speaks_it(lang, label, monkeypatch):
    monkeypatch.setenv("FINETUNE_LANG", lang)
    command = [sys.executable, "-m", "finetune", "train", "--lora_rank", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr.startswith(label)
