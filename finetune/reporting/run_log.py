"""train_log.jsonl: one JSON object per logged optimizer step and per evaluation.

A line is flushed as soon as it is written, so a killed process loses at most the line it was
writing. A run that resumes at step N first drops what the killed one logged beyond N (it will
log those steps again), so the file always reads like one uninterrupted run.

Floats stand in full precision (Python's shortest exact form). JSON has no NaN or infinity:
both are written as null.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, TypedDict

from finetune.storage.files import is_present, open_file, write_atomically

logger = logging.getLogger(__name__)


class TrainRecord(TypedDict):
    """What one logged optimizer step reports; sums and rates run over the steps since the last record.

    Attributes:
        step: Optimizer steps done, from 1.
        epoch: Passes over the training set done, with fraction.
        loss: Nats per label token.
        learning_rate: The rate this step was taken with.
        grad_norm: L2 norm of all gradients before clipping.
        num_tokens: Tokens fed to the model, padding not counted.
        num_label_tokens: Tokens that the loss was taken over.
        tokens_per_second: `num_tokens` by the seconds they took, over all processes.
        seconds: Wall time since the training of this run began.
        memory_bytes: Peak so far: resident memory of the process on CPU, device memory on GPU.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_label_tokens: int
    tokens_per_second: float
    seconds: float
    memory_bytes: int


class RunLog:
    """Appends records to a train_log.jsonl.

    Args:
        path: The file; its folder is created when missing.
        resume_step: Step of the checkpoint that the run continues from: later lines are removed.
            None starts a new run, and with it an empty file.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = (
            [] if resume_step is None else [r for r in read_log(self.path) if r.get("step", 0) <= resume_step]
        )
        self._evaluated = {_evaluation_key(record) for record in kept if record.get("kind") == "eval"}
        # Rewritten even when no line goes: this also mends a torn last line.
        write_atomically(self.path, "".join(_to_line(record) for record in kept).encode())
        self._file: TextIO = self.path.open("a", encoding="utf-8", newline="\n")

    def step(self, record: Mapping[str, Any] | TrainRecord) -> None:
        """Writes the record of an optimizer step (fields: `TrainRecord`)."""
        self._write({"kind": "train", **record})

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes the record of an evaluation: `step`, `epoch` and its metrics.

        One that the log had when it was opened is not written again: a run that continues at its last step, or
        only completes its end, repeats the evaluation of that step.
        """
        if _evaluation_key(record) not in self._evaluated:
            self._write({"kind": "eval", **record})

    def close(self) -> None:
        """Closes the file; further records are refused."""
        self._file.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_to_line(record))
        self._file.flush()


def _evaluation_key(record: Mapping[str, Any]) -> tuple[Any, frozenset[str]]:
    return record.get("step"), frozenset(record) - {"kind"}


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a train_log.jsonl.

    Args:
        path: The file. A missing one reads as empty.

    Returns:
        The records in the order of the file, each with `kind` "train" or "eval". A last line
        cut off by a kill is left out silently, any other unreadable line with a warning.

    Raises:
        UserError: It is no file, or may not be read.
    """
    if not is_present(path):
        return []
    with open_file(path) as file:
        lines = file.read().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # bad JSON or bad UTF-8
            record = None
        if isinstance(record, dict) and isinstance(record.get("step", 0), int):
            records.append(record)
        elif number < len(lines):
            logger.warning("%s:%d is no record and is left out: %r", path, number, line[:80])
    return records


def to_json_value(value: Any) -> Any:
    """Makes a value fit for JSON: array scalars become Python numbers, NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    if not isinstance(value, str | int | float | bool | None) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _to_line(record: Mapping[str, Any]) -> str:
    return json.dumps(to_json_value(record), ensure_ascii=False, allow_nan=False) + "\n"
