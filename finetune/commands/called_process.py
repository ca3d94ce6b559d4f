"""The process in which a call of `finetune.commands.python_calls` does its work.

It is started with a folder that holds the request, and leaves the faults of an error there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from finetune.commands.python_calls import FAULTS_FILE, REQUEST_FILE
from finetune.commands.registry import find_command
from finetune.errors import RunError, UserError
from finetune.machine.command_names import PROGRAM
from finetune.machine.command_start import hear_signals, prepare_process
from finetune.machine.language.translation import keep_values
from finetune.processes.command import run_command


def main() -> int | None:
    """Runs the command of the request; its exit code, None for 0."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
    keep_values(request)
    sys.argv[:] = [PROGRAM]  # next steps are named as this program's
    try:
        return run(request)
    except (UserError, RunError) as error:
        faults = error.faults if isinstance(error, UserError) else [str(error)]
        (folder / FAULTS_FILE).write_text(json.dumps({"faults": list(faults)}), encoding="utf-8")
        raise


def run(request: dict[str, Any]) -> int | None:
    """Runs one command.

    Args:
        request: The word of the command, its further words, and for a training its settings.
    """
    command = find_command(request["command"])
    if not command.threads_below:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    prepare_process()
    if "settings" in request:
        return command.load()(request["words"], overrides=request["settings"])
    return command.load()(request["words"])


if __name__ == "__main__":
    hear_signals()
    sys.exit(run_command(main))
