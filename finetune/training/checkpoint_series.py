"""The checkpoints of a run: a new one, the best one, and which old ones go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.checkpoints.folder import find_fault, rotate, step_of, write_checkpoint
from finetune.processes.joint_steps import fail_on_all_ranks, on_first

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
    """

    args: Any
    run_state: RunState
    phases: PhaseRecord

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.args.output_dir)

    def save(self, metrics: dict[str, float] | None) -> None:
        """Writes a checkpoint of the step that is done, and deletes what is too old.

        Args:
            metrics: Of the evaluation of this step; None without one.
        """
        run_state = self.run_state
        groups, state = run_state.files.groups, run_state.events.state
        self._note_best(metrics)
        self.phases.enter("saving", state.global_step)
        newest = write_checkpoint(self.output_dir, state.global_step, run_state.write, groups)
        with fail_on_all_ranks(groups):
            if groups.is_first:
                rotate(self.output_dir, keep=self.args.save_total_limit, best=self._best(), newest=newest)

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
