"""The commands of every family's README run as they stand there (with a tiny model in place of real weights)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from finetune.models.tiny.__main__ import main
from tests.conftest import ROOT, losses, run_entry

FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/sft_argument.json"))
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
BUILD, TRAIN, LAUNCH = (
    ["python", "-m", "finetune.models.tiny"],
    ["python", "finetune_generation.py"],
    ["python", "-m", "paddle.distributed.launch"],
)


def commands(folder: str, page: str = "README.md") -> list[list[str]]:
    text = (ROOT / folder / page).read_text(encoding="utf-8")
    return [shlex.split(line) for block in BLOCK.findall(text) for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_commands_run(folder, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "data").symlink_to(small_data)
    trained, launched, model = [], [], ""
    for command in commands(folder):
        if command[:3] == BUILD:
            model = command[4]
            main(command[3:])
        elif command[:2] == TRAIN:
            arguments, *options = command[2:]
            if any(option.startswith("/path/to/") for option in options):
                options = [model if option.startswith("/path/to/") else option for option in options]
                options += ["--device", "cpu", "--max_steps", "2"]
            assert run_entry(Path(arguments), *options, "--disable_tqdm", "true") == 0
            trained.append(Path(arguments).name)
        else:
            assert command[:3] == LAUNCH, f"a command that no test runs: {shlex.join(command)}"
            launched.append(Path(command[command.index("finetune_generation.py") + 1]).name)
    assert trained == ["sft_argument.json", "lora_argument.json", "pt_argument.json"]
    assert launched == ["sft_argument.json", "sft_pp_argument.json"]
    for method in ("sft", "lora", "pt"):
        assert len(losses(Path("checkpoints") / f"{folder}_{method}")) == 2


@pytest.mark.parametrize("folder", FOLDERS)
def test_both_languages_have_the_same_commands_and_tables(folder):
    assert commands(folder) == commands(folder, "README_zh.md")
    english, chinese = (
        (ROOT / folder / page).read_text(encoding="utf-8") for page in ("README.md", "README_zh.md")
    )
    assert english.count("\n|") == chinese.count("\n|") and english.count("\n#") == chinese.count("\n#")
