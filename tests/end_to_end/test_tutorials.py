"""Every command of the tutorials runs as it stands there, trainings cut short; what they promise is seen in full runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.models.tiny.__main__ import main
from finetune.serving.predict.run import parse_options, predict
from tests.conftest import ROOT, losses, run_entry

TUTORIALS = ("customer_service", "domain", "many_cards")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORT = {"1000": "30", "900": "20", "120": "10"}
"""Steps of the page -> steps of the ordinary test."""


def commands(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / "tutorials" / f"{page}.md").read_text(encoding="utf-8")
    blocks = [block for kind, block in BLOCK.findall(text) if not kind]  # others are data, or need cards
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """Looks like a checkout."""
    monkeypatch.chdir(tmp_path)
    for name in ("data", "llama"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def follow(page: str, *, in_full: bool = False) -> None:
    """Runs the commands of a page in this process."""
    for command in commands(page):
        words = command if in_full else [SHORT.get(word, word) for word in command]
        if words[1:3] == ["-m", "finetune.models.tiny"]:
            main(words[3:])
        elif words[1] == "finetune_generation.py":
            assert run_entry(*words[2:], "--disable_tqdm", "true", "--data_cache", "false") == 0
        elif "--data_file" in words:
            options = parse_options(words[2:])
            options.check()
            predict(options)
        else:
            assert "--system" in words, f"a command that no test runs: {shlex.join(words)}"
            parse_options(words[2:]).check()


def answers(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("page", TUTORIALS)
def test_both_languages_have_the_same_commands(page):
    assert commands(page) and commands(page) == commands(f"{page}_zh")


def test_conversations_are_trained_and_answered(folder, capsys):
    follow("customer_service")
    assert len(answers("service_answers.jsonl")) == 100
    assert "[[" in capsys.readouterr().out  # the preview marks what is learned
    assert json.loads(Path("checkpoints/service/all_results.json").read_text())["train_steps"] == 30


def test_texts_and_questions_of_a_domain_are_trained(folder):
    follow("domain")
    assert len(answers("domain_answers.jsonl")) == len(answers("domain_without.jsonl")) == 60
    arguments = json.loads(Path("checkpoints/domain_answers/arguments.json").read_text())
    assert arguments["model_name_or_path"] == "checkpoints/domain_texts"


@pytest.mark.distributed
def test_one_file_from_four_processes_to_two(folder):
    tiny, refused, four, two, answer = commands("many_cards")
    main(tiny[3:])
    assert run_entry(*refused[2:]) == 2
    for command in (four, two):
        script = command.index("finetune_generation.py")
        words = [*command[1:script], str(ROOT / command[script]), *command[script + 1 :]]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *words], env=environ, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses(Path("checkpoints/cards"))) == 6
    predict(parse_options(answer[2:]))
    assert len(answers("checkpoints/cards_answers.jsonl")) == 200


@pytest.mark.slow_distributed  # not distributed, but as long: about ten minutes
def test_the_rule_of_the_shop_is_learned(folder):
    follow("customer_service", in_full=True)
    rows = answers("service_answers.jsonl")
    said = [(row["output"].strip(), row["messages"][-1]["content"]) for row in rows]
    states = ("on its way|正在路上", "packed|打包", "delivered|送达")

    def state(text: str) -> int | None:
        return next((place for place, words in enumerate(states) if re.search(words, text)), None)

    assert sum(state(output) == state(target) for output, target in said) >= 95
    assert sum(output == target for output, target in said) >= 60


@pytest.mark.slow_distributed
def test_texts_bring_the_facts(folder):
    follow("domain", in_full=True)
    right = {
        name: sum(row["output"].strip() == row["tgt"] for row in answers(f"{name}.jsonl"))
        for name in ("domain_answers", "domain_without")
    }
    assert right["domain_answers"] >= 40 and right["domain_without"] <= 15
