"""The checkpoints of a run: a new one, the best one, and which old ones go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.checkpoints.failed_saves import find_joint_reason
from finetune.checkpoints.folder import (
    find_fault,
    list_checkpoints,
    rotate,
    step_of,
    write_checkpoint,
)
from finetune.errors import RunError, list_some
from finetune.processes.joint_steps import fail_on_all_ranks, on_first
from finetune.storage.disk_failures import describe_disk_failure

if TYPE_CHECKING:
    from finetune.processes.phases import PhaseRecord
    from finetune.training.run_state import RunState


@dataclass(frozen=True)
class CheckpointSeries:
    """Saves where the training stands; all ranks call every method.

    Attributes:
        args: PaddleNLP's TrainingArguments: where checkpoints go, how many stay, which metric tells the best one.
        run_state: What a checkpoint holds.
        phases: What this process does.
        continues_on_error: Whether training goes on when the disk takes no checkpoint.
        failed: Steps whose checkpoints could not be saved, and why.
        kept: Steps whose checkpoints could not be deleted, which has been said.
    """

    args: Any
    run_state: RunState
    phases: PhaseRecord
    continues_on_error: bool = False
    failed: dict[int, str] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.args.output_dir)

    def save(self, metrics: dict[str, float] | None, *, is_last: bool = False) -> None:
        """Writes a checkpoint of the step that is done, and deletes what is too old.

        Args:
            metrics: Of the evaluation of this step; None without one.
            is_last: Whether the process ends after it, so that a failure is one of the run.

        Raises:
            RunError: The disk took no checkpoint, and training is not to go on without. Earlier checkpoints stay.
        """
        run_state = self.run_state
        groups, state = run_state.files.groups, run_state.events.state
        best = state.best_metric, state.best_model_checkpoint
        self._note_best(metrics)
        self.phases.enter("saving", state.global_step)
        try:
            newest = write_checkpoint(
                self.output_dir,
                state.global_step,
                run_state.write,
                groups,
                has_moments=run_state.with_moments,
            )
        except Exception as error:
            state.best_metric, state.best_model_checkpoint = best
            self._go_on_without(error, is_last=is_last)
            return
        with fail_on_all_ranks(groups):
            if groups.is_first:
                self._rotate(newest)

    def remove_old(self) -> None:
        """Deletes what is too old once more: a process that was ended between a save and this had no time to."""
        groups = self.run_state.files.groups
        with fail_on_all_ranks(groups):
            if groups.is_first and (found := list_checkpoints(self.output_dir)):
                self._rotate(found[-1])

    def _rotate(self, newest: Path) -> None:
        """Deletes what is too old, and says once of each folder that cannot be deleted why it stays."""
        limit = self.args.save_total_limit
        for path, error in rotate(self.output_dir, keep=limit, best=self._best(), newest=newest).items():
            if (
                step := path.name.rpartition("-")[2]
            ) not in self.kept:  # its folder may have been renamed since
                self.kept.add(step)
                reason = describe_disk_failure(error) or str(error)
                self.run_state.log.show_message(
                    f"warning: {path}, the old checkpoint of step {step}, cannot be deleted and stays ({reason})"
                )

    def _go_on_without(self, error: Exception, *, is_last: bool) -> None:
        run_state = self.run_state
        groups, step = run_state.files.groups, run_state.events.state.global_step
        if (reason := find_joint_reason(error, groups)) is None:
            raise error
        last = on_first(groups, lambda: next(iter(list_checkpoints(self.output_dir)[-1:]), None))
        good = f"{last.name} is the last good one" if last else "there is none yet"
        text = f"the checkpoint of step {step} cannot be saved ({reason}); {good}"
        if is_last or not self.continues_on_error:
            raise RunError(
                f"{text}. Start the same command again to continue from the last good one; with on_save_error "
                "continue the training goes on without"
            ) from error
        self.failed[step] = reason
        run_state.log.show_message(f"warning: {text}. Training goes on, as on_save_error says")

    def describe_failures(self) -> str | None:
        """What is to be said at the end of a run some of whose checkpoints are missing."""
        if not self.failed:
            return None
        steps = list_some([str(step) for step in self.failed], 10, separator=", ")
        return f"warning: no checkpoint of step {steps} was saved ({[*self.failed.values()][-1]})"

    def load_best(self) -> int | None:
        """Puts the best weights in place, or says why the last ones stay.

        Returns:
            The step whose weights were loaded; None where the last ones stay.
        """
        run_state, best = self.run_state, self._best()
        if best is None or step_of(best) == run_state.events.state.global_step:
            return None
        fault = on_first(run_state.files.groups, lambda: find_fault(best) if best.is_dir() else "it is gone")
        if fault:
            run_state.log.show_message(
                f"warning: the best checkpoint {best} cannot be used: {fault}. The last weights are kept."
            )
            return None
        run_state.files.load_weights(best)
        return step_of(best)

    def _best(self) -> Path | None:
        name = self.run_state.events.state.best_model_checkpoint
        return self.output_dir / Path(name).name if name else None

    def _note_best(self, metrics: dict[str, float] | None) -> None:
        name, state = self.args.metric_for_best_model, self.run_state.events.state
        if metrics is None or name is None:
            return
        value = metrics[name if name.startswith("eval_") else f"eval_{name}"]
        best = state.best_metric
        if best is None or (value > best if self.args.greater_is_better else value < best):
            state.best_metric = value
            state.best_model_checkpoint = f"checkpoint-{state.global_step}"
