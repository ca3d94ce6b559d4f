"""What a training counts, shows on the screen and writes to its log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from finetune.reporting.memory import peak_memory_bytes

if TYPE_CHECKING:
    from finetune.reporting.progress import ProgressReporter
    from finetune.reporting.run_log import RunLog

_OPTIONAL = ("loss_scale", "skipped")
"""Fields of a record that only float16 runs have."""


class TrainingLog:
    """The figures of the whole training and those since the last record.

    Attributes:
        progress: What a person sees; None on all processes but the first.
        run_log: train_log.jsonl; None on all processes but the first, and where nothing is trained.
    """

    def __init__(self) -> None:
        self.progress: ProgressReporter | None = None
        self.run_log: RunLog | None = None
        self._totals = {"loss": 0.0, "steps": 0, "seconds": 0.0, "num_tokens": 0, "num_label_tokens": 0}
        self._interval = {"num_tokens": 0, "num_label_tokens": 0, "seconds": 0.0}
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Shows the bar of the training."""
        if self.progress:
            self.progress.start()

    def close(self) -> None:
        """Leaves the screen as it stands and closes the log."""
        self.close_progress()
        if self.run_log:
            self.run_log.close()

    def close_progress(self) -> None:
        """Leaves the screen as it stands."""
        if self.progress:
            self.progress.close()

    def show_message(self, text: str) -> None:
        """Shows a line to the person, above the progress bar."""
        if self.progress:
            self.progress.message(text)

    def restart_clock(self) -> None:
        """What went by since the last step is not the time of the next one."""
        self._mark = time.perf_counter()

    def count(self, loss: float, num_tokens: int, num_label_tokens: int) -> None:
        """Adds a step, over all processes, that is done now."""
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        for sums in (self._totals, self._interval):
            sums["num_tokens"] += num_tokens
            sums["num_label_tokens"] += num_label_tokens
            sums["seconds"] += seconds
        if math.isfinite(loss):
            self._totals["loss"] += loss
            self._totals["steps"] += 1

    def show_step(self, record: Mapping[str, Any]) -> None:
        """Shows a step that is done, logged or not."""
        if self.progress:
            self.progress.step(record)

    def write_step(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the record of a step and begins a new interval.

        Args:
            record: `step`, `epoch`, `loss`, `learning_rate`, `grad_norm`; `loss_scale` and `skipped` where there are;
                `figures`, further metrics of the step by name.

        Returns:
            The record as written (`finetune.reporting.run_log.TrainRecord`).
        """
        interval, self._interval = self._interval, dict.fromkeys(self._interval, 0)
        written = {
            **{key: record[key] for key in ("step", "epoch", "loss", "learning_rate", "grad_norm")},
            "num_tokens": int(interval["num_tokens"]),
            "num_label_tokens": int(interval["num_label_tokens"]),
            "tokens_per_second": interval["num_tokens"] / max(interval["seconds"], 1e-9),
            "seconds": self._totals["seconds"],
            "memory_bytes": peak_memory_bytes(),
            **{key: record[key] for key in _OPTIONAL if key in record},
            **record.get("figures", {}),
        }
        if self.run_log:
            self.run_log.step(written)
        if self.progress:
            self.progress.log(written)
        return written

    def evaluating(self, num_batches: int, label: str) -> AbstractContextManager[Callable[[], None]]:
        """Shows how far an evaluation is; gives what is to be called after each batch."""
        return self.progress.evaluating(num_batches, label) if self.progress else nullcontext(lambda: None)

    def write_evaluation(self, record: Mapping[str, Any], *, is_known: bool = False) -> None:
        """Shows and writes the metrics of an evaluation.

        Args:
            record: `step`, `epoch` and metrics.
            is_known: Whether the log has them already.
        """
        if self.run_log and not is_known:
            self.run_log.evaluation(record)
        if self.progress:
            self.progress.evaluation(record)

    def metrics(self) -> dict[str, float]:
        """The results of the training: mean loss, steps, seconds, tokens, tokens per second."""
        totals = self._totals
        return {
            "train_loss": totals["loss"] / max(totals["steps"], 1),
            "train_steps": totals["steps"],
            "train_seconds": totals["seconds"],
            "train_num_tokens": totals["num_tokens"],
            "train_num_label_tokens": totals["num_label_tokens"],
            "train_tokens_per_second": totals["num_tokens"] / max(totals["seconds"], 1e-9),
        }

    def counts(self) -> dict[str, dict[str, float]]:
        """All sums, for a checkpoint."""
        return {"totals": self._totals, "interval": self._interval}

    def restore(self, counts: Mapping[str, Any]) -> None:
        """Continues from the sums of a checkpoint."""
        self._totals |= counts["totals"]
        self._interval |= counts["interval"]
