"""The program `paddle-finetune`: one command for everything, its words in `registry`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from finetune import __version__
from finetune.commands.registry import COMMANDS, Command
from finetune.errors import UserError
from finetune.machine.command_names import PROGRAM, called_as
from finetune.machine.command_start import hear_signals, prepare_process
from finetune.machine.screen import print_text
from finetune.processes.command import run_command
from finetune.settings.argument_file import is_argument_file

_HELP = ("--help", "-h", "help")
_HELP_OF_COMMANDS = frozenset(["--help", "-h", "--help-all", "--help_all"])


def main() -> int:
    """Runs the command that the words of this process name; its exit code."""
    hear_signals()
    return run_command(lambda: run(sys.argv[1:]))


def run(words: Sequence[str]) -> int | None:
    """Runs one command.

    Args:
        words: The command and its words.

    Returns:
        Its exit code, None for 0.

    Raises:
        UserError: No command has this name.
    """
    if not words or words[0] in _HELP:
        return _help(words[1:])
    if words[0] in ("--version", "-V", "version"):
        print(f"{PROGRAM} {__version__}")
        return None
    command, rest = _find(words)
    if command is None:
        print_text(_list_commands(f"{words[0]} "))
        return None
    if not command.threads_below:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if _HELP_OF_COMMANDS.isdisjoint(rest):
        prepare_process()  # not for help, which needs no NumPy
    return command.load()(rest)


def _find(words: Sequence[str]) -> tuple[Command | None, list[str]]:
    """The command that the words begin with, and its words; None for the help of a word that has several kinds."""
    for command in COMMANDS:
        own = command.word.split()
        if list(words[: len(own)]) == own:
            return command, list(words[len(own) :])
    kinds = [command.word.split()[1] for command in COMMANDS if command.word.startswith(f"{words[0]} ")]
    if kinds:
        if len(words) > 1 and words[1] in _HELP:
            return None, []
        given = f'is followed by "{words[1]}"' if len(words) > 1 else "is not followed by what to merge"
        raise UserError(f"{words[0]} {given}: write {' or '.join(f'{words[0]} {kind}' for kind in kinds)}")
    if is_argument_file(words[0]):
        raise UserError(f"{words[0]} is an argument file, not a command: write train {words[0]}")
    raise UserError(f'there is no command "{words[0]}": {_nearest(words[0])}')


def _nearest(word: str) -> str:
    from difflib import get_close_matches

    names = [command.word.split()[0] for command in COMMANDS]
    near = get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(dict.fromkeys(names))}"


def _help(words: Sequence[str]) -> int | None:
    """The list of commands; for a command's name its own help, for another word the settings that have it."""
    if not words:
        print_text(_list_commands())
        return None
    if any(command.word.split()[0] == words[0] for command in COMMANDS):
        return run([*words, "--help"])
    from finetune.settings.help import format_matches

    print(format_matches(words[0]))
    return None


def _list_commands(beginning: str = "") -> str:
    program = called_as() or PROGRAM
    lines = [
        f"  {command.word:<14}{command.summary}" for command in COMMANDS if command.word.startswith(beginning)
    ]
    if beginning:
        return "\n".join([f"usage: {program} {beginning}KIND ...", "", *lines])
    return "\n".join(
        [
            f"usage: {program} COMMAND ...",
            "",
            "Fine-tune generative language models on PaddlePaddle.",
            "",
            *lines,
            "",
            f"{program} COMMAND --help tells its options; {program} --help WORD",
            "finds settings by a word of their name or help; --version tells the version.",
        ]
    )
