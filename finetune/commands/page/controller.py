"""Starts, finds and stops the process of a run: one at a time, and as long-lived as it needs to be.

A run is the command `train` in a process and a session of its own, so that neither Ctrl-C nor the end of the page ends
it. A page that is started again finds it by its folder: process.json there has the process id, and the words with which
that process was started name the run's argument file, as another process may have got the id since.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from finetune.commands.page.run_folder import RunFolder, RunState, check_name, is_finished, read_state
from finetune.errors import UserError
from finetune.machine.language.choice import LANGUAGE_VARIABLE
from finetune.serving.web.secrets import SecretKind
from finetune.storage.files import read_json_or_empty, write_json
from finetune.storage.lock import take_lock

PASSWORD = SecretKind("the password", "password_file", "FINETUNE_PAGE_PASSWORD", "the page")
_PROJECT = Path(__file__).resolve().parents[3]
_LOCK_FILE = ".page.lock"


class RunController:
    """The runs below one folder.

    Args:
        runs_dir: The folder; made where it is missing.

    Raises:
        UserError: Another page has it, or it cannot be written.
    """

    def __init__(self, runs_dir: Path):
        self.runs_dir = runs_dir.absolute()
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._guard = threading.RLock()
        try:
            self.runs_dir.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = take_lock(self.runs_dir / _LOCK_FILE, f"runs_dir {runs_dir}")
        except OSError as error:
            raise UserError(
                f"runs_dir {runs_dir} cannot be written: {error.strerror}. Choose another folder."
            ) from None

    def close(self) -> None:
        """Lets another page have the folder; a run goes on."""
        self._lock.close()

    def folder(self, name: str) -> RunFolder:
        """Where the files of a run are, or would be.

        Raises:
            UserError: It is no name of a run.
        """
        return RunFolder(self.runs_dir / check_name(name))

    def names(self) -> list[str]:
        """All runs, that which was started last first."""
        found = [path.parent for path in self.runs_dir.glob("*/argument.json")]
        return [path.name for path in sorted(found, key=_started_at, reverse=True)]

    def current(self) -> str | None:
        """The run whose process lives."""
        return next((name for name in self.names() if self._process_of(self.folder(name)) is not None), None)

    def state(self, name: str) -> RunState:
        """How far a run is."""
        folder = self.folder(name)
        with self._guard:
            return read_state(folder, is_alive=self._process_of(folder) is not None)

    def start(self, name: str, arguments: Mapping[str, Any], *, language: str = "en") -> None:
        """Starts a new run.

        Args:
            name: Of the run and its folder.
            arguments: Its settings, but for `output_dir`.
            language: In which it speaks.

        Raises:
            UserError: The name is taken, or another run is going on.
        """
        folder = self.folder(name)
        with self._guard:
            self._refuse_second(name)
            if folder.arguments.exists():
                raise UserError(
                    f'there is a run "{name}" already: take another name, or resume that one in the list of runs'
                )
            folder.path.mkdir(exist_ok=True)
            write_json(folder.arguments, {**arguments, "output_dir": str(folder.output)})
            self._launch(folder, language)

    def resume(self, name: str, *, language: str = "en") -> None:
        """Goes on with a run that was stopped or failed, from its newest checkpoint.

        Raises:
            UserError: There is no such run, it is finished, or one is going on.
        """
        folder = self.folder(name)
        with self._guard:
            self._refuse_second(name)
            if not folder.arguments.is_file():
                raise UserError(f'there is no run "{name}": choose one of the list')
            if is_finished(folder):
                raise UserError(f'the run "{name}" is finished: start another one to train further')
            self._launch(folder, language)

    def stop(self, name: str) -> None:
        """Asks a run to save what it has and to end; it does so after the step that it is at.

        Raises:
            UserError: It does not run.
        """
        folder = self.folder(name)
        with self._guard:
            pid = self._process_of(folder)
            if pid is None:
                raise UserError(f'the run "{name}" does not run: there is nothing to stop')
            write_json(folder.process, read_json_or_empty(folder.process) | {"stop_asked": True})
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def wait(self, name: str, seconds: float) -> bool:
        """Waits for the end of a run; whether it came."""
        folder, deadline = self.folder(name), time.monotonic() + seconds
        while self._process_of(folder) is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _refuse_second(self, name: str) -> None:
        if (other := self.current()) is not None:
            which = "it" if other == name else f'"{other}"'
            raise UserError(f"one run at a time, and {which} is going on: stop it first, or wait for its end")

    def _launch(self, folder: RunFolder, language: str) -> None:
        words = [sys.executable, "-m", "finetune", "train", str(folder.arguments)]
        with folder.log.open("ab") as log:
            child = subprocess.Popen(
                words,
                env=child_environment(language),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children[child.pid] = child
        write_json(folder.process, {"pid": child.pid, "started": time.time()})

    def _process_of(self, folder: RunFolder) -> int | None:
        """The process id of a run that lives; one that has ended is written down with its exit code."""
        with self._guard:
            process = read_json_or_empty(folder.process)
            pid = process.get("pid")
            if not isinstance(pid, int) or "exit_code" in process:
                return None
            if (
                child := self._children.get(pid)
            ) is not None:  # its id is not given again before it is collected
                if (code := child.poll()) is None:
                    return pid
                del self._children[pid]
                write_json(folder.process, process | {"exit_code": code})
                return None
            return pid if _runs_file(pid, folder.arguments) else None


def child_environment(language: str) -> dict[str, str]:
    """The environment of a process that the page starts: its language, and no password."""
    environment = {name: value for name, value in os.environ.items() if name != PASSWORD.variable}
    paths: Sequence[str] = [str(_PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environment | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "100",
        LANGUAGE_VARIABLE: language,
    }


def _runs_file(pid: int, arguments: Path) -> bool:
    """Whether a process lives and was started with an argument file."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and str(arguments) in process.cmdline()
    except psutil.Error:
        return False


def _started_at(path: Path) -> float:
    try:
        return float(read_json_or_empty(path / "process.json").get("started") or 0)
    except (TypeError, ValueError):
        return 0.0
