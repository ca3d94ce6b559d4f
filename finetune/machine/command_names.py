"""How the command that runs now was called, so that usage lines and next steps name what the user has.

A command has two names: a word of `paddle-finetune` (also `python -m finetune`), and a script of the repository or a
module. Which of them was used stands in the first word of the command line.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "paddle-finetune"
_PACKAGE = "finetune"

TRAIN, PREVIEW, PREDICT, CHAT, SERVE, EXPORT, TINY = (
    "train",
    "preview",
    "predict",
    "chat",
    "serve",
    "export",
    "tiny",
)
MERGE_LORA, MERGE_RANKS = "merge lora", "merge tp"

SCRIPTS = {
    TRAIN: "finetune_generation.py",
    PREDICT: "predict_generation.py",
    MERGE_LORA: "merge_lora_params.py",
    MERGE_RANKS: "merge_tp_params.py",
    EXPORT: "export_model.py",
}
"""Command -> the script of the repository that does the same."""

MODULES = {
    CHAT: "python -m finetune.chat",
    SERVE: "python -m finetune serve",
    TINY: "python -m finetune.models.tiny",
}
"""Command -> how the module that does the same is started."""


_COMMANDS = {name: command for command, name in (*SCRIPTS.items(), *MODULES.items())}
_SCRIPT_NAME = re.compile(
    rf"""(?<![\w/."'“-])(?:python )?({"|".join(map(re.escape, _COMMANDS))})(?![\w"'”/]|-\w|\.\w)"""
)
_LAUNCHER = "paddle.distributed.launch"


def python_name() -> str:
    """How to call this Python again from the current folder: `.venv/bin/python`, or just `python`."""
    executable = Path(sys.executable)
    try:
        return str(executable.relative_to(Path.cwd()))
    except ValueError:
        return "python"


def called_as() -> str | None:
    """`paddle-finetune` or `python -m finetune` where this process was started so; None for scripts and modules."""
    program = Path(sys.argv[0] if sys.argv else "")
    if program.name in (PROGRAM, f"{PROGRAM}.exe"):
        return PROGRAM
    if program.name == "__main__.py" and program.parent.name == _PACKAGE:
        return f"{python_name()} -m {_PACKAGE}"
    return None


def usage_name(command: str) -> str:
    """What a usage line calls a command: `paddle-finetune train`, `finetune_generation.py`, `python -m finetune.chat`."""
    if (program := called_as()) is not None:
        return f"{program} {command}"
    return SCRIPTS[command] if command in SCRIPTS else MODULES[command]


def launched_name(command: str) -> str:
    """A command as the launcher of several processes takes it: a script, or a program."""
    return f"{PROGRAM} {command}" if called_as() == PROGRAM else SCRIPTS[command]


def name_as_called(text: str) -> str:
    """A message with its commands called as this process was: messages stand in the code with the names of scripts.

    What stands in quotes or behind a slash is a person's file and stays; so does what is handed to the launcher of
    several processes, which takes scripts.
    """
    if (".py" not in text and "-m finetune" not in text) or (program := called_as()) is None:
        return text
    return "\n".join(
        line
        if _LAUNCHER in line
        else _SCRIPT_NAME.sub(lambda found: f"{program} {_COMMANDS[found[1]]}", line)
        for line in text.split("\n")
    )


def next_command(command: str, words: Sequence[str]) -> str:
    """A line for the shell that works where the user stands.

    Args:
        command: A key of `SCRIPTS`.
        words: What follows it; quoted here.
    """
    if (program := called_as()) is not None:
        return f"{program} {command} {shlex.join(words)}"
    started = Path(sys.argv[0] if sys.argv else "")
    folder = started.parent if started.name in SCRIPTS.values() else Path()
    return shlex.join([python_name(), str(folder / SCRIPTS[command]), *words])
