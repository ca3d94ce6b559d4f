"""The evaluation of a run: once for each step, shown and logged."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.parallel.parallel_model import ParallelModel
    from finetune.processes.phases import PhaseRecord
    from finetune.training.evaluation import Evaluation
    from finetune.training.events import CallbackEvents
    from finetune.training.training_log import TrainingLog


class EvaluationRun:
    """Evaluates the current weights.

    Args:
        evaluation: What is evaluated, and how; None in a run that only trains.
        parallel: The model.
        events: Callbacks, state and control.
        log: Shows and writes.
        phases: What this process does.
        autocast: Gives the context of mixed precision.

    Attributes:
        loaded_step: The earlier step that the weights are of; None as long as they are the last ones.
    """

    def __init__(
        self,
        evaluation: Evaluation | None,
        parallel: ParallelModel,
        *,
        events: CallbackEvents,
        log: TrainingLog,
        phases: PhaseRecord,
        autocast: Callable[[], AbstractContextManager[Any]],
    ):
        self._evaluation, self._parallel = evaluation, parallel
        self._events, self._log, self._phases, self._autocast = events, log, phases, autocast
        self.loaded_step: int | None = None
        self._last: tuple[int, dict[str, float]] | None = None

    def note_loaded(self, step: int) -> None:
        """From now on the weights are those of an earlier step: the best checkpoint."""
        self.loaded_step, self._last = step, None

    def run(self, prefix: str = "eval") -> dict[str, float]:
        """Metrics by name, each with the prefix and "_"; the same step is not evaluated twice."""
        is_loaded = self.loaded_step is not None
        step = self._events.state.global_step if self.loaded_step is None else self.loaded_step
        if self._last and self._last[0] == step:
            return self._last[1]
        began = time.perf_counter()
        self._phases.enter("evaluation", step)
        model, evaluation = self._parallel.model, self._evaluation
        assert evaluation is not None, "a run that only trains is not evaluated"
        model.eval()
        with self._log.evaluating(evaluation.num_batches, evaluation.label) as advance, self._autocast():
            raw = evaluation.run(self._parallel, advance)
        model.train()
        metrics = {f"{prefix}_{name}": value for name, value in raw.items()}
        record = {"step": step, "epoch": self._events.state.epoch or 0.0} | metrics
        record[f"{prefix}_seconds"] = time.perf_counter() - began
        if is_loaded:
            self._log.show_message(f"The best checkpoint is that of step {step}")
        # The best weights were evaluated and logged when they were saved.
        self._log.write_evaluation(record, is_known=is_loaded)
        self._events.tell("on_log", dict(record))
        self._events.tell("on_evaluate", metrics)
        self._last = (step, metrics)
        return metrics
