"""Starts real processes through Paddle's launcher, with a time limit, and shows each rank's last lines."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 30
GRACE_SECONDS = 5

# What the environment of the test run may say about a launch of its own.
_INHERITED = re.compile(r"^(PADDLE_|FLAGS_selected_|MASTER_(ADDR|PORT)$|POD_|TRAINER_)")


@dataclass(frozen=True)
class Launch:
    """What came of a launch.

    Attributes:
        exit_code: The launcher's own. It is that of the lowest rank that did not end with 0, which may be 241
            (stopped by the launcher) when another rank failed first.
        outputs: Everything that each rank wrote, both streams together.
        launcher_output: What the launcher wrote itself, with rank 0's lines among it.
        failed: The ranks that the launcher saw fail, with their exit codes.
    """

    exit_code: int
    outputs: tuple[str, ...]
    launcher_output: str
    failed: Mapping[int, int] = field(default_factory=dict)

    def tails(self, num_lines: int = TAIL_LINES) -> str:
        """The last lines of every rank, to show on failure."""
        parts = [f"--- launcher, exit code {self.exit_code}", *self.launcher_output.splitlines()[-5:]]
        for rank, output in enumerate(self.outputs):
            parts += [f"--- rank {rank}, last lines", *output.splitlines()[-num_lines:]]
        return "\n".join(parts)

    def check(self) -> Launch:
        """This launch, if it succeeded.

        Raises:
            AssertionError: With every rank's last lines.
        """
        if self.exit_code != 0:
            raise AssertionError(f"the launch failed\n{self.tails()}")
        return self


def launch_script(
    script: str | Path,
    num_processes: int,
    args: Sequence[str] = (),
    *,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    cwd: Path | None = None,
) -> Launch:
    """Runs a script on several CPU processes of this machine and waits for their end.

    Args:
        script: A file (a `Path`, or a text that ends in ".py"), or the source itself.
        num_processes: Number of ranks.
        args: The script's arguments.
        timeout: Seconds after which every process of the launch is ended.
        env: Added to the environment.
        options: More options for the launcher, such as `--nnodes`.
        cwd: Working directory; a fresh one by default.

    Raises:
        AssertionError: The time is over; the message shows every rank's last lines.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-launch-") as folder:
        logs = Path(folder) / "logs"
        path = (
            Path(script) if isinstance(script, Path) or script.endswith(".py") else Path(folder) / "worker.py"
        )
        if not path.exists():
            path.write_text(str(script), encoding="utf-8")
        command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(num_processes)]
        command += ["--log_dir", str(logs), *options, str(path.resolve()), *args]
        own_output = Path(folder) / "launcher.log"
        # To a file, not a pipe: a worker that outlives the launcher would keep the pipe open.
        with own_output.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                command, cwd=cwd or folder, env=_environment(env), stdout=stream, stderr=subprocess.STDOUT
            )
            exit_code = _wait(process, timeout)
        result = _collect(-1 if exit_code is None else exit_code, logs, own_output, num_processes)
    if exit_code is None:
        raise AssertionError(f"not done after {timeout:g} s\n{result.tails()}")
    return result


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """The environment of the launcher: one thread per rank, this checkout first on the path."""
    env = {name: value for name, value in os.environ.items() if not _INHERITED.match(name)}
    path = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    env |= {"PYTHONUNBUFFERED": "1", "GLOG_minloglevel": "2"}
    return env | dict(extra or {})


def _wait(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """Exit code, or None after the limit; in any case nothing that the launch started is left running."""
    started: list[psutil.Process] = []
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            # The launcher gives each rank a session of its own, so they are found as its descendants.
            with contextlib.suppress(psutil.NoSuchProcess):
                started = psutil.Process(process.pid).children(recursive=True)
            process.terminate()  # the launcher passes it on
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            if process.poll() is None:
                process.kill()
            process.wait()
            for child in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()  # psutil compares start times: never another process with the same id


def _collect(exit_code: int, logs: Path, own_output: Path, num_processes: int) -> Launch:
    """Reads what the launch left behind."""
    outputs = []
    for rank in range(num_processes):
        log = logs / f"workerlog.{rank}"
        outputs.append(log.read_text(encoding="utf-8", errors="replace") if log.exists() else "")
    text = own_output.read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"Container rank (\d+) status failed .*? code (-?\d+)", text)
    return Launch(exit_code, tuple(outputs), text, {int(rank): int(code) for rank, code in failed})
