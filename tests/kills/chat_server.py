"""The chat server as something that is killed: while it loads, while it serves, in the middle of an answer.

It needs Gradio, which may be another interpreter's: FINETUNE_CHAT_PYTHON names one that has it and the project's other
packages.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.conftest import ROOT
from tests.distributed.server_runs import Kill, Run
from tests.serving.chat.page_client import stream_message

NAME = "chat server"
PYTHON_VARIABLE = "FINETUNE_CHAT_PYTHON"
MOMENTS = ("serving", "answering")
_QUESTION = "类型#裙*颜色#红色*"
_LONG = (0.9, 1, 0, 1, 100, 7)
"""The controls of an answer that takes a moment: two models write 100 tokens each."""
_SEEDED = (0.9, 1, 0, 1, 12, 20)
_START_SECONDS = 100
_END_SECONDS = 15


def find_interpreter() -> str | None:
    """An interpreter with Gradio; None where there is none."""
    given = os.environ.get(PYTHON_VARIABLE)
    return given or (sys.executable if importlib.util.find_spec("gradio") else None)


class ChatServer:
    """One command for a model with and without its adapter, on a port of its own.

    Args:
        python: An interpreter with Gradio.
        model: The model folder.
        adapter: An adapter of it.
        home: A folder for what the process writes: its output, and what it believes to be temporary.
    """

    def __init__(self, python: str, model: Path, adapter: Path, home: Path):
        self._folders, self._home = (model, adapter), home
        self._temporary = home / "temporary"
        self._temporary.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._command = [
            python, "-m", "finetune.chat", "--model_name_or_path", str(model), "--lora_path", str(adapter),
            "--port", str(self._port), "--device", "cpu", "--chat_template", "chatglm2", "--min_new_tokens", "80",
        ]  # fmt: skip
        self._environ = os.environ | {
            "PYTHONPATH": str(ROOT), "TMPDIR": str(self._temporary), "OMP_NUM_THREADS": "1", "GLOG_minloglevel": "2",
        }  # fmt: skip

    def start(self, output: Path, kill: Kill | None) -> Run:
        """Starts the command, asks it once where it comes to serve, and ends it: by the kill, or by SIGTERM.

        Args:
            output: A file; every answer to the question is added to it.
            kill: When to end it, and how; its moments are `MOMENTS`.
        """
        began = time.monotonic()
        log = self._home / "log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environ, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                start_new_session=True,
            )  # fmt: skip
        killed = False
        try:
            if kill is not None and kill.path is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(kill.seconds)
            elif self._wait_until_open(process, log):
                self._use(output, kill)
            seconds = time.monotonic() - began
            killed = kill is not None and process.poll() is None
            if process.poll() is None:
                process.send_signal(signal.SIGTERM if kill is None else kill.number)
            hung = _wait_for_end(process)
        finally:
            process.kill()
            process.wait()
        return Run(
            output, (process.returncode,), (log.read_text(errors="replace"),), seconds, killed=killed, hung=hung,
            orphans=_end_session(process.pid) + self._num_left(), home=self._home,
        )  # fmt: skip

    def contents(self, output: Path) -> dict[str, str]:
        """The different answers that were given to the one question, and hashes of what it read."""
        answers = set(output.read_text(encoding="utf-8").splitlines())
        read = {
            f"{number} {path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()
            for number, folder in enumerate(self._folders)
            for path in folder.rglob("*")
            if path.is_file()
        }
        return read | {"answers": json.dumps(sorted(answers))}

    def _use(self, output: Path, kill: Kill | None) -> None:
        """Asks the question; for a kill, waits for its moment, in an answer or out of one."""
        url = f"http://127.0.0.1:{self._port}"
        *_, last = (each for each in stream_message(url, _QUESTION, _SEEDED) if each["msg"] != "close_stream")
        assert last["success"], last
        with output.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([last["success"], last["output"]["data"]], ensure_ascii=False) + "\n")
        if kill is not None and kill.path == "answering":
            events = stream_message(url, _QUESTION, _LONG)
            assert any(each["msg"] == "process_generating" for each in events), "the answer came at once"
        time.sleep(kill.seconds if kill else 0)

    def _wait_until_open(self, process: subprocess.Popen[bytes], log: Path) -> bool:
        deadline = time.monotonic() + _START_SECONDS
        while not re.search(r"^Open http", log.read_text(errors="replace"), re.MULTILINE):
            if process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _num_left(self) -> int:
        """Temporary files and sockets, and the port, if it is still taken.

        Gradio makes two empty folders for its cache, the same ones at every start.
        """
        left = sum(1 for path in self._temporary.rglob("*") if not path.is_dir())
        try:
            socket.create_server(("127.0.0.1", self._port)).close()
        except OSError:
            return left + 1
        return left


def _wait_for_end(process: subprocess.Popen[bytes]) -> bool:
    """Whether it had to be ended by force."""
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def _end_session(leader: int) -> int:
    """How many processes of its session the server has left behind; they are ended."""
    left = list(_members(leader))
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    return len(left)


def _members(leader: int) -> Iterator[psutil.Process]:
    for each in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(each.pid) == leader and each.status() != psutil.STATUS_ZOMBIE:
                yield each
