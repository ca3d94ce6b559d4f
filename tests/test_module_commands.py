"""The commands that `python -m` starts, under the names that users have learned, older ones among them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

COMMANDS = {
    "finetune.chat": "finetune.chat",
    "finetune.demo": "finetune.demo",
    "finetune.environment": "finetune.environment",
    "finetune.machine.environment": "finetune.environment",
    "finetune.machine.stand_ins": "finetune.stand_ins",
    "finetune.models.tiny": "finetune.models.tiny",
    "finetune.stand_ins": "finetune.stand_ins",
}
"""Module -> how its help calls it."""


def run(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT, capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_answers_under_its_name(module):
    result = run(module, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: python -m {COMMANDS[module]} ")


@pytest.mark.parametrize("module", COMMANDS)
def test_an_option_that_does_not_exist_is_refused(module):
    result = run(module, "--no_such_option")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_the_list_of_stand_ins_names_target_reason_and_test():
    text = run("finetune.stand_ins").stdout
    assert "\n  paddle.nn.functional.dropout\n      its masks follow the order of all draws" in text
    assert "paddlepaddle 3.3.1, shown by tests/machine/randomness/test_dropout.py" in text


def test_the_check_of_versions_says_that_all_is_well():
    assert run("finetune.environment").stdout == "Every package that matters has a version that was tested.\n"
