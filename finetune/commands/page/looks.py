"""What a run would train on and what it would take: the commands `preview` and `plan`, run for the page."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from finetune.commands.page.choices import written_arguments
from finetune.commands.page.controller import child_environment
from finetune.errors import EXIT_FAILED, UserError

_SECONDS = 300
_MAX_CHARACTERS = 200_000
_ONE_AT_A_TIME = threading.Lock()


def show_preview(arguments: Mapping[str, Any], *, language: str = "en", num_samples: int = 3) -> str:
    """The first samples of a run, what is learned of them in ``[[ ]]``, and figures of all.

    Raises:
        UserError: The same faults as in a run; or it takes too long.
    """
    return _run("preview", arguments, ["--preview", str(num_samples)], language)


def show_plan(arguments: Mapping[str, Any], *, language: str = "en") -> str:
    """Parameters, steps, memory, disk and time of a run.

    Raises:
        UserError: The same faults as in a run; or it takes too long.
    """
    return _run("plan", arguments, [], language)


def _run(command: str, arguments: Mapping[str, Any], words: list[str], language: str) -> str:
    with _ONE_AT_A_TIME, written_arguments(arguments) as path:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "finetune", command, str(path), *words],
                env=child_environment(language),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"the data could not be looked at within {_SECONDS} s: try it with a part of them"
            ) from None
        said = done.stdout.decode("utf-8", "replace").replace(f" in {path}", "").strip()
    if done.returncode not in (0, EXIT_FAILED):  # a plan that does not fit is told like one that does
        raise UserError([line.partition(": ")[2] or line for line in said.splitlines()[-5:]])
    return said[:_MAX_CHARACTERS]
