"""The loop over optimizer steps: count, log, evaluate, save, stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.processes.phases import PhaseRecord
from finetune.training.checkpoint_series import CheckpointSeries
from finetune.training.events import CallbackEvents
from finetune.training.optimizer_step import OptimizerStep, StepResult
from finetune.training.prefetch import PrefetchedSource
from finetune.training.stop_signal import StopSignal
from finetune.training.training_log import TrainingLog


@dataclass(frozen=True)
class TrainingLoop:
    """Trains from the step that the state names to the last one.

    Attributes:
        step: Computes a step.
        batches: Gives its batch.
        events: Callbacks, state and control.
        log: Counts, shows and writes.
        phases: What this process does.
        stop: Whether this process was told to stop.
        evaluate: Metrics of the current weights.
        checkpoints: Where checkpoints go.
        check_replicas: Compares what ranks must agree on; told when this is.
        replica_check_steps: Steps between these comparisons; 0: at start and saves only.
        global_batch_size: Samples of a step over all processes.
    """

    step: OptimizerStep
    batches: PrefetchedSource
    events: CallbackEvents
    log: TrainingLog
    phases: PhaseRecord
    stop: StopSignal
    evaluate: Callable[[], dict[str, float]]
    checkpoints: CheckpointSeries
    check_replicas: Callable[[str], None]
    replica_check_steps: int
    global_batch_size: int

    def run(self) -> None:
        """Trains to the last step.

        Raises:
            Interrupted: A process was told to stop; the step in progress was finished and saved first.
        """
        with self.stop.noted():
            self.log.start()
            self._compare("at the start")
            try:
                self.log.restart_clock()
                while self.events.state.global_step < self.events.state.max_steps:
                    self._run_step()
            finally:
                if note := self.batches.close():
                    self.log.show_message(note)
                self.log.close_progress()

    def _run_step(self) -> None:
        state, events = self.events.state, self.events
        events.tell("on_step_begin")
        self.phases.enter("reading", state.global_step + 1)
        batch = self.batches.batch(state.global_step)
        if batch.note:
            self.log.show_message(batch.note)
        result = self.step.train_batch(state.global_step, batch, stop=self.stop.number is not None)
        self.log.count(result.loss, batch.num_tokens, batch.num_label_tokens)
        done = state.global_step + 1
        state.global_step, state.epoch = done, self.batches.epoch(done)
        state.consumed_samples = done * self.global_batch_size
        events.tell("on_step_end")
        if self.batches.ends_epoch(done) or done == state.max_steps:
            events.tell("on_epoch_end")
        self._log_step(result, batch.num_tokens)
        self._evaluate_and_save(stops=result.stops)
        if result.stops:
            self.stop.end_run(done, state.max_steps)

    def _log_step(self, result: StepResult, num_tokens: int) -> None:
        state, is_skipped = self.events.state, "skipped" in result.facts
        record: dict[str, Any] = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": result.loss,
            "num_tokens": num_tokens,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "figures": result.figures,
        } | result.facts
        if is_skipped and self.step.overflow:
            self.log.show_message(
                f"step {state.global_step} skipped: float16 overflowed at a loss scale of "
                f"{record['loss_scale']:g}; the next one is {self.step.overflow.scale:g}"
            )
        self.log.show_step(record)
        if self.events.control.should_log or state.global_step == state.max_steps or is_skipped:
            self.events.tell("on_log", self.log.write_step(record))

    def _evaluate_and_save(self, *, stops: bool) -> None:
        control, when = self.events.control, f"after step {self.events.state.global_step}"
        metrics = self.evaluate() if control.should_evaluate else None
        if self.replica_check_steps and self.events.state.global_step % self.replica_check_steps == 0:
            self._compare(when)
        saves = control.should_save or stops
        if saves:
            self._compare(when)
            self.checkpoints.save(metrics, is_last=stops)
            self.events.tell("on_save")
        if metrics is not None or saves:
            self.log.restart_clock()

    def _compare(self, when: str) -> None:
        self.phases.enter("comparing replicas", self.events.state.global_step)
        self.check_replicas(when)
