"""Runs of the project's scripts in forks of one process that has the libraries loaded, and what comes of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.device_reads import watched_reads

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 25

Curve = dict[str, dict[int, float]]
"""Figures by name and step."""


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        folder: Its output folder.
        codes: Exit codes by rank.
        logs: What each rank wrote.
        seconds: Wall time.
        timed_out: Whether it was stopped.
        killed: Whether its ranks were killed on purpose.
        hung: Whether some had to be ended by force, because they did not end in time.
        told: Whether others had to be told to end after one of them was killed.
        orphans: Processes that its ranks left behind.
        home: Where its logs are.
    """

    folder: Path
    codes: tuple[int, ...]
    logs: tuple[str, ...]
    seconds: float
    timed_out: bool = False
    killed: bool = False
    hung: bool = False
    told: bool = False
    orphans: int = 0
    home: Path = Path()

    def reads(self, call: str) -> dict[int, list[list[str]]]:
        """By rank, what a step ("train_batch") or an evaluation ("run") read from the device, each time."""
        paths = {rank: self.home / f"reads.{rank}.jsonl" for rank in range(len(self.codes))}
        return {rank: watched_reads(path, call) for rank, path in paths.items()}

    @property
    def refusal(self) -> str:
        """Why the run was refused, in the program's words; "" when it was not."""
        if set(self.codes) != {2}:
            return ""
        lines = [
            line.partition("error: ")[2] for line in self.logs[0].splitlines() if line.startswith("error: ")
        ]
        return lines[0] if lines else "?"

    def tails(self) -> str:
        """The last lines of each rank."""
        parts = ["the time was over" if self.timed_out else f"exit codes {self.codes}"]
        for rank, log in enumerate(self.logs):
            parts += [f"--- rank {rank}, last lines", *log.splitlines()[-TAIL_LINES:]]
        return "\n".join(parts)

    def check(self) -> Run:
        """This run, if it succeeded.

        Raises:
            AssertionError: With every rank's last lines.
        """
        if any(self.codes):
            raise AssertionError(f"the run failed\n{self.tails()}")
        return self

    def curve(self) -> Curve:
        """See `read_curve`."""
        return read_curve(self.folder)


_COMPARED = (
    "loss", "grad_norm", "learning_rate", "num_tokens", "num_label_tokens",
    "eval_loss", "eval_perplexity", "eval_accuracy", "loss_scale",
)  # fmt: skip


def read_curve(folder: Path) -> Curve:
    """What is compared of a run, by name and step.

    Args:
        folder: Its output folder.
    """
    found: Curve = {}
    for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name in _COMPARED:
            if record.get(name) is not None:  # a step that overflowed has no loss
                found.setdefault(name, {})[record["step"]] = float(record[name])
    return found


@dataclass(frozen=True)
class Kill:
    """A moment at which ranks of a run are sent a signal.

    Attributes:
        path: A pattern below the run's output folder, or beside it; the moment is when a new name appears. None for
            the start.
        seconds: To wait after that.
        number: The signal.
        rank: Who gets it; None for all.
    """

    path: str | None
    seconds: float = 0.0
    number: int = signal.SIGKILL
    rank: int | None = None

    def request(self, output: Path) -> dict[str, Any]:
        """What the server is told."""
        path = None if self.path is None else os.path.normpath(output / self.path)
        return {"path": path, "seconds": self.seconds, "signal": int(self.number), "rank": self.rank}


class RankServer:
    """Starts runs in forks of one process that has loaded the libraries; see `rank_server.py`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._count = 0
        drop = ("PADDLE_", "FLAGS_", "MASTER_", "POD_", "TRAINER_", "MKL_NUM", "OMP_NUM")
        env = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
        env |= {
            "PYTHONPATH": str(ROOT),
            "MKL_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "GLOG_minloglevel": "2",
        }
        self._log = (folder / "server.log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.rank_server"],
            cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        if self._answer() != "ready":
            raise RuntimeError(Path(self._log.name).read_text(encoding="utf-8"))

    def run(
        self,
        settings: Mapping[str, Any],
        world: int = 1,
        *,
        timeout: float = 120,
        folder: Path | None = None,
        kill: Kill | None = None,
        counts_reads: bool = False,
    ) -> Run:
        """Runs the entry script on so many processes.

        Args:
            settings: Arguments by name, without `output_dir`.
            world: Number of processes.
            timeout: Seconds after which they are ended.
            folder: The run's output folder; a fresh one by default.
            kill: When to kill all of them; None lets them end by themselves.
            counts_reads: Whether to note what each rank reads from the device; see `Run.reads`.
        """
        home = self._new_home()
        output = folder or home / "out"
        arguments = home / "arguments.json"
        arguments.write_text(json.dumps({**settings, "output_dir": str(output)}), encoding="utf-8")
        moment = kill.request(output) if kill else None
        request = {"argv": [str(arguments)], "world": world, "timeout": timeout, "kill": moment}
        request["counts_reads"] = counts_reads
        return self._send(home, output, request)

    def run_file(
        self, path: Path, options: Mapping[str, Any], world: int = 1, *, kill: Kill | None = None
    ) -> Run:
        """Runs the entry script with an argument file as it is and options behind it, among them `output_dir`."""
        output = Path(options["output_dir"])
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        moment = kill.request(output) if kill else None
        request = {"argv": [str(path), *words], "world": world, "timeout": 120, "kill": moment}
        return self._send(self._new_home(), output, request)

    def run_script(
        self, script: str, argv: Sequence[object], output: Path, *, kill: Kill | None = None
    ) -> Run:
        """Runs another script of the project in one process.

        Args:
            script: Its name without ending.
            argv: Its command line.
            output: The folder that it writes.
            kill: When to send it a signal.
        """
        moment = kill.request(output) if kill else None
        request = {
            "argv": [str(word) for word in argv],
            "world": 1,
            "timeout": 120,
            "script": script,
            "kill": moment,
        }
        return self._send(self._new_home(), output, request)

    def _new_home(self) -> Path:
        self._count += 1
        home = self.folder / f"run-{self._count}"
        home.mkdir()
        return home

    def _send(self, home: Path, output: Path, request: dict[str, Any]) -> Run:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request | {"logs": str(home)}) + "\n")
        self._process.stdin.flush()
        line = self._answer()
        if not line:
            raise RuntimeError(
                f"the server ended\n{Path(self._log.name).read_text(encoding='utf-8')[-3000:]}"
            )
        answer = json.loads(line)
        logs = tuple(
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            for path in (home / f"rank.{rank}.log" for rank in range(request["world"]))
        )
        return Run(
            output,
            tuple(answer["codes"]),
            logs,
            answer["seconds"],
            timed_out=answer["timed_out"],
            killed=answer["killed"],
            hung=answer["hung"],
            told=answer["told"],
            orphans=answer["orphans"],
            home=home,
        )

    def close(self) -> None:
        """Ends the server; its children end with it."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _answer(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()
