"""Training runs as processes of their own, watched until the moment to interrupt them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT


def start(arguments: Path, *, start_new_session: bool = False) -> subprocess.Popen:
    """Starts the entry script."""
    return subprocess.Popen(
        [sys.executable, "finetune_generation.py", str(arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen | None = None, timeout: float = 90
) -> None:
    """Waits for a condition, which must come before the process ends."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(
                f"ended by itself with {process.returncode}: {process.stderr.read()[-3000:]}"
            )
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def is_alive(pid: int) -> bool:
    """Whether a process runs, that is, has not ended and waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def logged_steps(out: Path) -> int:
    """Steps in the log of a run so far."""
    try:
        return (out / "train_log.jsonl").read_bytes().count(b'"kind": "train"')
    except FileNotFoundError:
        return 0
