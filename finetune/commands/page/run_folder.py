"""The folder of a run that the page started: what was asked for, which process does it, what it said, what came of it.

::

    NAME/argument.json   what the run was asked to do
    NAME/process.json    the process that does it, or did it last
    NAME/log.txt         what it said
    NAME/output/         its output_dir
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from finetune.checkpoints.folder import list_checkpoints
from finetune.errors import UserError
from finetune.reporting.run_log import read_log
from finetune.run.directory import FINISHED_FILE, RESULTS_FILE, TRAINED_FILE
from finetune.run.report import LOG_FILE
from finetune.storage.files import read_json_or_empty

STARTING, RUNNING, STOPPING = "starting", "running", "stopping"
STOPPED, FAILED, FINISHED = "stopped", "failed", "finished"
_NAME = re.compile(r"\w[\w.-]{0,63}")
_WINDOW_RECORDS = 50
"""Speed and time left are those of the last records, so that a slow start is soon forgotten."""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LOG_BYTES = 1 << 16


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are.

    Attributes:
        path: Its folder.
    """

    path: Path

    @property
    def arguments(self) -> Path:
        """What the run was asked to do."""
        return self.path / "argument.json"

    @property
    def process(self) -> Path:
        """The process that does it."""
        return self.path / "process.json"

    @property
    def log(self) -> Path:
        """What it said."""
        return self.path / "log.txt"

    @property
    def output(self) -> Path:
        """Its output_dir."""
        return self.path / "output"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How far a run is.

    Attributes:
        kind: One of the constants of this module.
        step: Optimizer steps done.
        num_steps: Of the whole run; None as long as it is not known.
        loss: Of the last logged step.
        tokens_per_second: Of the last steps.
        seconds_left: None as long as nothing can be said.
        curve: (step, loss) of the logged steps.
        evaluations: (step, loss) of the evaluations that have one.
        exit_code: Of the process that ended last, where it is known.
    """

    kind: str
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    curve: tuple[tuple[int, float], ...] = ()
    evaluations: tuple[tuple[int, float], ...] = ()
    exit_code: int | None = None

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self.kind in (STARTING, RUNNING, STOPPING)

    @property
    def can_be_tried(self) -> bool:
        """Whether there are final weights to talk with."""
        return self.kind == FINISHED


def check_name(name: str) -> str:
    """The name of a run, which is that of its folder.

    Raises:
        UserError: It could lead somewhere else.
    """
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise UserError(
            f'"{name[:64]}" cannot be the name of a run: take 1 to 64 letters, digits, "_", "-" or ".", beginning '
            "with a letter or digit"
        )
    return name


def read_state(folder: RunFolder, *, is_alive: bool) -> RunState:
    """How far a run is, by its files.

    Args:
        folder: The run.
        is_alive: Whether its process runs.
    """
    records = read_log(folder.output / LOG_FILE)
    steps = [record for record in records if record.get("kind") == "train"]
    last: dict[str, Any] = steps[-1] if steps else {}
    process = read_json_or_empty(folder.process)
    num_steps = _count_steps(last, read_json_or_empty(folder.arguments))
    kind = _kind(folder, process, is_alive=is_alive, has_steps=bool(steps))
    step = int(last.get("step", 0))
    seconds = _seconds_a_step(steps[-_WINDOW_RECORDS:])
    is_training = kind == RUNNING and num_steps is not None and seconds is not None
    return RunState(
        kind=kind,
        step=step,
        num_steps=num_steps,
        loss=last.get("loss"),
        tokens_per_second=last.get("tokens_per_second"),
        seconds_left=max(num_steps - step, 0) * seconds if is_training and num_steps and seconds else None,
        curve=_points(steps, "loss"),
        evaluations=_points([each for each in records if each.get("kind") == "eval"], "eval_loss", "loss"),
        exit_code=process.get("exit_code"),
    )


def read_log_end(folder: RunFolder, num_lines: int = 200) -> str:
    """The last lines that a run said, without colours."""
    try:
        with folder.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.rpartition("\r")[2] for line in _ESCAPES.sub("", text).split("\n")]
    return "\n".join(lines[-num_lines:]).strip("\n")


def is_finished(folder: RunFolder) -> bool:
    """Whether the last file of a run stands."""
    output = folder.output
    return (
        (output / FINISHED_FILE).is_file()
        and not (output / TRAINED_FILE).exists()
        and "train_steps" in read_json_or_empty(output / RESULTS_FILE)
    )


def _kind(folder: RunFolder, process: dict[str, Any], *, is_alive: bool, has_steps: bool) -> str:
    was_asked = bool(process.get("stop_asked"))
    if is_alive:
        return STOPPING if was_asked else RUNNING if has_steps else STARTING
    if is_finished(folder):
        return FINISHED
    if (
        was_asked or process.get("exit_code") is None
    ):  # nobody saw its end: the machine or the page ended, too
        return STOPPED if was_asked or list_checkpoints(folder.output) else FAILED
    return FAILED


def _count_steps(last: dict[str, Any], arguments: dict[str, Any]) -> int | None:
    """Steps of the whole run: what was asked for, or by the share of an epoch that a step is."""
    if isinstance(asked := arguments.get("max_steps"), int) and asked > 0:
        return asked
    step, epoch, num_epochs = last.get("step"), last.get("epoch"), arguments.get("num_train_epochs", 3)
    if not step or not epoch or not isinstance(num_epochs, int | float):
        return None
    return int(max(step, round(step / epoch * num_epochs)))


def _seconds_a_step(steps: Sequence[dict[str, Any]]) -> float | None:
    """Of the last steps; where a run went on after a stop, its clock began again."""
    spans = [
        (later["seconds"] - earlier["seconds"]) / (later["step"] - earlier["step"])
        for earlier, later in pairwise(steps)
        if later["step"] > earlier["step"] and later["seconds"] > earlier["seconds"]
    ]
    return median(spans) if spans else None


def _points(records: Sequence[dict[str, Any]], *names: str) -> tuple[tuple[int, float], ...]:
    found = []
    for record in records:
        value = next((record[name] for name in names if record.get(name) is not None), None)
        if isinstance(value, int | float):
            found.append((int(record["step"]), float(value)))
    return tuple(found)
