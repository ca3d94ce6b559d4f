"""A merge that is killed while it writes."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from tests.conftest import ROOT


def kill_while_writing(command: list[str], output: Path) -> Path:
    """Starts a merge and kills it when its first file appears; returns the folder that it wrote to until then."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    hidden = output.with_name(f".{output.name}.incomplete")
    deadline = time.monotonic() + 30
    while not list(hidden.glob("*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    return hidden
