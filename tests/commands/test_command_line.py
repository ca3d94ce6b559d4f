"""The program `paddle-finetune`: its words, its help, its codes, and how fast it answers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from finetune import __version__
from finetune.commands import command_line
from finetune.commands.registry import COMMANDS, find_command
from finetune.errors import UserError
from finetune.machine import command_names
from finetune.machine.command_names import MERGE_LORA, PREDICT, TRAIN, launched_name, next_command, usage_name
from finetune.machine.language.columns import count_columns
from finetune.machine.screen import print_text
from finetune.machine.stop_signals import end_command
from finetune.processes.command import run_command
from tests.conftest import ROOT

MAX_SECONDS = 0.3


def call(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "finetune", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "80"} | environ,
    )  # fmt: skip


@pytest.fixture
def called(monkeypatch):
    """Makes this process one that was started by other words."""
    return lambda *words: monkeypatch.setattr(sys, "argv", list(words))


def test_help_lists_every_command_and_fits_the_screen(capsys, called):
    called("paddle-finetune")
    assert command_line.run(["--help"]) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: paddle-finetune COMMAND ..."
    for command in COMMANDS:
        assert any(line.startswith(f"  {command.word} ") for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["--help", "warmup"]])
def test_answers_are_quick_and_load_neither_numpy_nor_paddle(words):
    code = (
        "import sys; from finetune.commands import command_line\n"
        "try:\n"
        "    code = command_line.main()\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "print([name for name in ('numpy', 'paddle', 'paddlenlp') if name in sys.modules], code, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stderr == "[] 0\n"


def test_the_list_of_commands_answers_at_once():
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        assert call("--help").returncode == 0
        seconds.append(time.monotonic() - began)
    assert min(seconds) < MAX_SECONDS


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.word)
def test_every_command_answers_for_its_help(command):
    assert callable(command.load())
    result = call(*command.word.split(), "--help")
    assert result.returncode == 0, result.stderr
    assert re.match(rf"usage: \S*python -m finetune {command.word}\b", result.stdout)


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.word)
def test_help_is_in_the_language_and_fits_the_screen(command, lang, capsys, called, monkeypatch):
    called("paddle-finetune")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FINETUNE_LANG", lang)
    with pytest.raises(SystemExit) as end:
        command_line.run([*command.word.split(), "--help"])
    assert end.value.code == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [line for line in "\n".join(blocks).splitlines() if count_columns(line) > 80] == []
    in_chinese = [bool(re.search("[一-鿿]", block)) for block in blocks]
    assert all(in_chinese) if lang == "zh" else not any(in_chinese[:3])  # one setting is about Chinese


def test_the_version(capsys):
    command_line.run(["--version"])
    assert capsys.readouterr().out == f"paddle-finetune {__version__}\n"


def test_help_of_a_word_finds_settings_by_name_and_by_help(capsys):
    command_line.run(["--help", "warmup"])
    text = capsys.readouterr().out
    assert "--warmup_steps" in text and "--warmup_ratio" in text and "--lora " not in text
    command_line.run(["--help", "偏好数据"])
    assert "--preference" in capsys.readouterr().out
    command_line.run(["--help", "learning-rate"])
    assert "--learning_rate" in capsys.readouterr().out


def test_help_of_a_command_is_its_own(capsys):
    with pytest.raises(SystemExit) as end:
        command_line.run(["--help", "train"])
    assert end.value.code == 0
    assert "Model and method:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["trian"], 'there is no command "trian": did you mean train?'),
        (["xyzzy"], 'there is no command "xyzzy": choose one of init, preview, plan, train'),
        (["merge"], "merge is not followed by what to merge: write merge lora or merge tp"),
        (["merge", "all"], 'merge is followed by "all": write merge lora or merge tp'),
        (["a.json"], "a.json is an argument file, not a command: write train a.json"),
        (["--help", "xyzzy"], 'no setting has "xyzzy" in its name or help: --help-all shows every setting'),
        (["--help", "lora_rnak"], "did you mean lora_rank"),
        (["train", "no.json"], "no.json"),
    ],
)
def test_what_is_wrong_is_told_with_code_2(words, message, capsys):
    assert run_command(lambda: command_line.run(words)) == 2
    assert message in capsys.readouterr().err


def test_a_command_hears_signals_as_its_script_does(monkeypatch):
    """It ends with what it has begun cleaned up, and leaves the caller's handlers as they were."""
    heard = []
    command = find_command("doctor")
    monkeypatch.setattr(type(command), "load", lambda self: lambda words: heard.append(signal.getsignal(15)))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert run_command(lambda: command_line.run(["doctor"])) == 0
    assert heard == [end_command]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_an_unknown_word_is_a_user_error():
    with pytest.raises(UserError):
        command_line.run(["nothing"])


def test_a_reader_that_goes_away_hears_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-m", "finetune", "--help"],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(writing)
    assert result.returncode == 1 and result.stderr == ""


# How commands call themselves


@pytest.mark.parametrize(
    "started, usage, launched",
    [
        ("/x/bin/paddle-finetune", "paddle-finetune train", "paddle-finetune train"),
        ("/x/finetune/__main__.py", "python -m finetune train", "finetune_generation.py"),
        ("finetune_generation.py", "finetune_generation.py", "finetune_generation.py"),
        ("/x/pytest/__main__.py", "finetune_generation.py", "finetune_generation.py"),
    ],
)
def test_usage_names_what_was_started(called, monkeypatch, started, usage, launched):
    monkeypatch.setattr(command_names, "python_name", lambda: "python")
    called(started)
    assert usage_name(TRAIN) == usage
    assert launched_name(TRAIN) == launched


@pytest.mark.parametrize(
    "text, shown",
    [
        ("merge it with merge_lora_params.py first", "merge it with paddle-finetune merge lora first"),
        ("(python export_model.py --quantize int4)", "(paddle-finetune export --quantize int4)"),
        ("Or python -m finetune.models.tiny llama", "Or paddle-finetune tiny llama"),
        ("a folder of export_model.py", "a folder of paddle-finetune export"),
        ("my/export_model.py is gone", "my/export_model.py is gone"),
        ('"export_model.py" is gone', '"export_model.py" is gone'),
        ("my-export_model.py or export_model.pyc", "my-export_model.py or export_model.pyc"),
        ("python -m paddle.distributed.launch finetune_generation.py", "python -m paddle.distributed.launch finetune_generation.py"),
    ],
)  # fmt: skip
def test_messages_name_commands_as_the_person_called_them(text, shown, called, capsys, monkeypatch):
    called("/x/bin/paddle-finetune")
    print_text(text)
    assert capsys.readouterr().out == f"{shown}\n"
    called("finetune_generation.py")
    print_text(text)
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize(
    "started, line",
    [
        ("/x/bin/paddle-finetune", "paddle-finetune merge lora --lora_path 'a b'"),
        ("merge_tp_params.py", "python merge_lora_params.py --lora_path 'a b'"),
        ("../repo/finetune_generation.py", "python ../repo/merge_lora_params.py --lora_path 'a b'"),
    ],
)
def test_next_steps_work_where_the_user_stands(called, monkeypatch, started, line):
    monkeypatch.setattr(command_names, "python_name", lambda: "python")
    called(started)
    assert next_command(MERGE_LORA, ["--lora_path", "a b"]) == line
    assert PREDICT in command_names.SCRIPTS
