"""Lines for a person: whole in a file, between words and coloured on a terminal."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from finetune.errors import UserError
from finetune.machine import quiet
from finetune.machine.screen import format_for, show_line
from finetune.processes.command import run_command

LONG = "error: " + "learning_rate is -1: it must be more than 0, so give a larger one, " * 3 + "/a" * 60


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_a_file_gets_the_line_as_it_is():
    stream = io.StringIO()
    show_line(LONG, stream)
    assert stream.getvalue() == LONG + "\n"


def test_a_terminal_breaks_between_words_alone():
    lines = format_for(LONG, Terminal()).replace("\033[1;31m", "").replace("\033[0m", "").split("\n")
    assert " ".join(lines).split() == LONG.split()
    assert all(len(line) <= 80 for line in lines if not line.startswith("/a"))
    assert "/a" * 60 in lines


@pytest.mark.parametrize(
    "text, shown",
    [
        ("error: no", "\033[1;31merror:\033[0m no"),
        ("warning: so", "\033[1;33mwarning:\033[0m so"),
        ("Data, train: 3 lines", "Data, train: 3 lines"),
    ],
)
def test_colours_of_a_terminal(text, shown):
    assert format_for(text, Terminal()) == shown


def test_no_color_is_obeyed(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert format_for("error: no", Terminal()) == "error: no"


def test_faults_of_a_command_are_shown_so(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def fail() -> None:
        raise UserError(["one", "two"])

    assert run_command(fail) == 2
    assert terminal.getvalue() == "\033[1;31merror:\033[0m one\n\033[1;31merror:\033[0m two\n"


def test_the_wait_for_paddle_is_announced_once(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "paddle", raising=False)
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    quiet.announce_import()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PADDLE_TRAINER_ID", "0")
    quiet.announce_import()
    assert capsys.readouterr().err == "Loading PaddlePaddle ...\n"
    monkeypatch.setitem(sys.modules, "paddle", object())
    quiet.announce_import()
    assert capsys.readouterr().err == ""


def test_fonts_are_not_talked_about(tmp_path):
    from finetune.reporting.plot import plot_losses

    (tmp_path / "log.jsonl").write_text("", encoding="utf-8")
    plot_losses(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.WARNING)
