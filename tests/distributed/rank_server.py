"""Forks the ranks of one run after another from a process that has the libraries loaded.

Importing PaddleNLP takes seconds, which a matrix of hundreds of runs would pay for every rank. This process imports
once, computes nothing with Paddle (so that no thread and no device exists yet) and forks; each child is told its place
through the environment variables that Paddle's launcher sets, and calls the entry script's `main`.

Run as a script: requests come as JSON lines on stdin, answers go as JSON lines to the original stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import glob
import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from tests.device_reads import watch_run

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = (
    "adapters", "checkpoints", "data", "families", "machine", "models", "parallel", "processes", "randomness",
    "reporting", "tokenizers", "training",
)  # fmt: skip
_OPTIONAL = ("mlflow",)
"""Packages that only some runs ask for."""
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 15.0
ENDING_SECONDS = 40.0
"""How long ranks may take to end after they were told to, or after one of them was killed."""
LAUNCHER_SECONDS = 15.0
"""After a kill; then what is left is told to end, which Paddle's launcher does when it sees a rank fail."""
ORPHAN_SECONDS = 8.0
STOPPED = -9
ENTRY = "finetune_generation"


def serve() -> None:
    """Answers requests until stdin ends."""
    _end_with_parent()
    # What a rank that was killed had started comes to this process, which can count and end it.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _import_all()
    gc.collect()
    gc.freeze()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


def _end_with_parent() -> None:
    """Asks the kernel to end this process with the one that started it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _import_all() -> None:
    """What the entry script would import, and nothing computed."""
    from finetune.machine.processor import configure_processor

    configure_processor()
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot
    import paddlenlp.peft
    import paddlenlp.trainer
    import paddlenlp.transformers  # noqa: F401

    import finetune_generation  # noqa: F401
    from finetune.families.family import families, import_object
    from finetune.run import directory, report, trainer  # noqa: F401
    from finetune.run.preview import preview  # noqa: F401

    for package in _PACKAGES:
        folder = ROOT / "finetune" / package
        for module in pkgutil.walk_packages([str(folder)], f"finetune.{package}."):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                if error.name not in _OPTIONAL:
                    raise
    for family in families().values():
        import_object(family.model_class)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """One run: its ranks' exit codes, and whether its time was over or it was killed on purpose.

    Args:
        request: `argv` of the script, `world`, `timeout` in seconds, `logs` (folder), `env`, `script` (the entry
            script by default), `kill` (`path`, a pattern of which a new name is waited for, or None for the
            start; `seconds` after it; `signal`, SIGKILL by default; `rank`, all by default), `counts_reads` (whether
            each rank notes what it reads from the device).
    """
    began = time.monotonic()
    places = _places(request["world"])
    kill, killed, hung, told = request.get("kill"), False, False, 0.0
    known = set(glob.glob(kill["path"])) if kill and kill.get("path") else set()
    children = {
        _fork(request, rank, place | request.get("env", {})): rank for rank, place in enumerate(places)
    }
    codes: dict[int, int] = {}
    deadline = began + request["timeout"]
    while len(codes) < len(children):
        for child in [child for child, rank in children.items() if rank not in codes]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[children[child]] = os.waitstatus_to_exitcode(status)
                if (
                    codes[children[child]] and not killed
                ):  # the others wait for it; soon they may have said so
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if kill and not killed and not codes and _has_come(kill, known):
            time.sleep(kill["seconds"])
            killed, deadline = True, time.monotonic() + ENDING_SECONDS
            told = time.monotonic() + LAUNCHER_SECONDS
            _stop(
                [child for child, rank in children.items() if kill.get("rank") in (None, rank)],
                kill.get("signal", signal.SIGKILL),
            )
        if codes and any(codes.values()) and 0 < told < time.monotonic():
            told = -1.0
            _stop([child for child, rank in children.items() if rank not in codes], signal.SIGTERM)
        if time.monotonic() > deadline:
            hung = True
            rest = [child for child, rank in children.items() if rank not in codes]
            _stop(rest, signal.SIGKILL)
            for child in rest:
                os.waitpid(child, 0)
                codes[children[child]] = STOPPED
        time.sleep(0.001 if kill and not killed else 0.01)
    return {
        "codes": [codes[rank] for rank in range(len(children))],
        "timed_out": hung and not killed,
        "killed": killed,
        "hung": hung,
        "told": told < 0,
        "orphans": _end_orphans(),
        "seconds": time.monotonic() - began,
    }


def _has_come(kill: dict[str, Any], known: set[str]) -> bool:
    """Whether the moment of a kill has come: a name that was not there before the run."""
    return not kill.get("path") or not known.issuperset(glob.glob(kill["path"]))


def _end_orphans() -> int:
    """How many processes the ranks have left behind; they are ended."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = [
            int(number)
            for task in Path("/proc/self/task").iterdir()
            for number in (task / "children").read_text().split()
        ]
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    _stop(left, signal.SIGKILL)
    for child in left:
        os.waitpid(child, 0)
    return len(left)


def _stop(children: list[int], number: int) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)


def _places(world: int) -> list[dict[str, str]]:
    """The launcher's environment of each rank; empty for a single process."""
    if world == 1:
        return [{}]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(world + 1)]
    master, *endpoints = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return [
        {
            "PADDLE_MASTER": master,
            "PADDLE_GLOBAL_SIZE": str(world),
            "PADDLE_LOCAL_SIZE": str(world),
            "PADDLE_GLOBAL_RANK": str(rank),
            "PADDLE_LOCAL_RANK": str(rank),
            "PADDLE_RANK_IN_NODE": str(rank),
            "PADDLE_NNODES": "1",
            "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(world),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_DISTRI_BACKEND": "gloo",
        }
        for rank in range(world)
    ]


def _fork(request: dict[str, Any], rank: int, environ: dict[str, str]) -> int:
    """Starts a rank; returns its process number."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        _end_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        os.environ.update(environ)
        log = os.open(
            Path(request["logs"]) / f"rank.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
        )
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if request.get("counts_reads"):
            watch_run(Path(request["logs"]) / f"reads.{rank}.jsonl")
        code = _main(request.get("script", ENTRY), request["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        # The parent's exit handlers are not this process's.
        os._exit(code)


def _main(script: str, argv: list[str]) -> int:
    from finetune.processes.command import run_command

    sys.argv = [f"{script}.py", *argv]
    return run_command(importlib.import_module(script).main)


if __name__ == "__main__":
    serve()
