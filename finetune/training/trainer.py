"""The trainer: PaddleNLP's Trainer with our contracts of order, loss and safety.

What comes from PaddleNLP: the arguments, optimizer, schedule, mixed precision and the callbacks that decide when to
log, evaluate and save. What is ours: optimizer step k always consumes global batch k of one order that depends on the
seed alone; its loss is the sum over label tokens divided by their number in the whole global batch; all randomness is
keyed by (seed, step, sample); a checkpoint is whole or absent.

This module puts the parts together; each is handed what it uses and knows no trainer: the loop (`loop.py`) and its steps
(`optimizer_step.py`, `step.py`), callbacks (`events.py`), what is counted and shown (`training_log.py`), evaluation
(`evaluation_run.py`), saving (`checkpoint_series.py`, `run_state.py`, `model_files.py`), signals (`stop_signal.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle
from paddlenlp.trainer import PrinterCallback, ProgressCallback, Trainer
from paddlenlp.trainer.trainer_callback import TrainerState

from finetune.training.checkpoint_series import CheckpointSeries
from finetune.training.evaluation_run import EvaluationRun
from finetune.training.events import CallbackEvents
from finetune.training.loop import TrainingLoop
from finetune.training.model_files import ModelFiles
from finetune.training.optimizer_step import OptimizerStep
from finetune.training.overflow import OverflowGuard
from finetune.training.parts import RunParts
from finetune.training.prefetch import PrefetchedSource
from finetune.training.run_state import RunState, read_trainer_state
from finetune.training.step import ForwardParts
from finetune.training.stop_signal import StopSignal
from finetune.training.training_log import TrainingLog

if TYPE_CHECKING:
    from finetune.data.batches.batch_source import BatchSource
    from finetune.training.evaluation import Evaluation

OVERRIDDEN = {
    "__init__": "takes batches, evaluation and process groups; removes the callbacks that print",
    "create_optimizer": "updates slices under sharding, decays matrices by their shape, leaves clipping to the loop",
    "train": "runs our loop: one order of samples, one loss per global batch, whole checkpoints",
    "evaluate": "runs the evaluation given at construction, over all ranks, once for each step",
}
"""What of PaddleNLP's Trainer is replaced, and why; docs/architecture.md shows it."""


def _frozen_scalar() -> Any:
    scalar = paddle.create_parameter([1], "float32")
    scalar.stop_gradient = True
    return scalar


class FinetuneTrainer(Trainer):
    """Trains and evaluates a causal language model or an adapter on one.

    Args:
        model: PaddleNLP model, LoRAModel or PrefixModelForCausalLM.
        args: PaddleNLP's TrainingArguments.
        batches: Gives the batches of each step; None when only evaluating.
        evaluation: What `evaluate` runs, or None.
        tokenizer: PaddleNLP's tokenizer, saved beside the weights.
        parts: Layout, randomness and limits of the run.

    Attributes:
        parallel: The model as all ranks compute it together.
        model_files: Write and read it.
        training_log: Counts, shows and writes.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        batches: BatchSource | None,
        evaluation: Evaluation | None,
        tokenizer: Any,
        parts: RunParts | None = None,
    ):
        super().__init__(model=model, args=args, tokenizer=tokenizer)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.parts = parts = parts or RunParts()
        self.groups, self.parallel = parts.groups, parts.build_parallel(model)
        self.batches, self.evaluation, self.training_log = batches, evaluation, TrainingLog()
        self.model_files = ModelFiles(model, tokenizer, self.parallel.replicas, self.groups)
        self.overflow = OverflowGuard(self.scaler, parts.max_skipped_steps) if self.do_grad_scaling else None
        self.events = CallbackEvents(
            self.callback_handler, args, self.state, self.control, is_first=self.groups.is_first
        )
        self._evaluation_run = EvaluationRun(
            evaluation,
            self.parallel,
            events=self.events,
            log=self.training_log,
            phases=parts.phases,
            autocast=self.autocast_smart_context_manager,
        )

    def plan_steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        per_epoch = self.batches.steps_per_epoch if self.batches else 0
        assert per_epoch, "a stream needs max_steps"
        return max(1, round(per_epoch * float(self.args.num_train_epochs)))

    def create_optimizer(self, lr_scheduler: Any = None) -> Any:
        """PaddleNLP's optimizer on what this rank updates; clipping is done before it is called.

        Weight decay is for matrices: norms and biases go without. PaddleNLP tells them by the words
        "norm" and "bias" in their names, which misses the norms of families that call them `ln_1`.
        """
        replicas = self.parallel.replicas
        # Paddle's optimizers look at their first parameter; a stage of a pipeline may train none.
        self.optimizer_grouped_parameters = replicas.optimizer_parameters() or [_frozen_scalar()]
        optimizer = super().create_optimizer(lr_scheduler)
        optimizer._grad_clip = None
        optimizer._apply_decay_param_fun = replicas.is_decayed
        self.optimizer = replicas.distribute(optimizer)
        return self.optimizer

    def train(self, resume_from_checkpoint: str | Path | None = None) -> dict[str, float]:
        """Trains to the last step, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: A valid checkpoint folder of the same run, or None.

        Returns:
            Totals of the training: mean loss, steps, seconds, tokens, tokens per second.

        Raises:
            Interrupted: SIGTERM arrived; the step in progress was finished and saved first.
        """
        assert self.batches is not None, "a trainer without batches only evaluates"
        max_steps, per_epoch = self.plan_steps(), self.batches.steps_per_epoch
        num_epochs = -(-max_steps // per_epoch) if per_epoch else 1
        batches = PrefetchedSource(self.batches, max_steps)
        self.create_optimizer_and_scheduler(max_steps)
        self.events.set_state(TrainerState(max_steps=max_steps, num_train_epochs=num_epochs))
        checkpoints = self._checkpoints(batches)
        if resume_from_checkpoint is not None:
            checkpoints.run_state.restore(Path(resume_from_checkpoint))
        self.events.set_optimizer(self.optimizer, self.lr_scheduler)
        self.events.tell("on_train_begin")
        self.model.train()
        self.is_in_train = True
        self._loop(batches, checkpoints).run()
        self.is_in_train = False
        checkpoints.remove_old()
        if note := checkpoints.describe_failures():
            self.training_log.show_message(note)
        if self.overflow and (note := self.overflow.describe_end(max_steps)):
            self.training_log.show_message(note)
        self.events.tell("on_train_end")
        if self.args.load_best_model_at_end and (best := checkpoints.load_best()) is not None:
            self._evaluation_run.note_loaded(best)
        return self.training_log.metrics()

    def take_up(self, folder: Path, *, best_step: int | None) -> None:
        """Takes weights and state of a finished training, to evaluate them.

        Args:
            folder: Holds what `model_files` wrote, and PaddleNLP's trainer state.
            best_step: The step of the weights, where they are not the last ones.
        """
        self.model_files.load_weights(folder)
        self.events.set_state(read_trainer_state(folder))
        if best_step is not None:
            self._evaluation_run.note_loaded(best_step)

    @property
    def best_step(self) -> int | None:
        """The step of the best weights, where they were put in place of the last ones."""
        return self._evaluation_run.loaded_step

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the current weights by name, each with the prefix "eval_"; logged, and taken once for each step.

        `eval_dataset` and `ignore_keys` are PaddleNLP's parameters and not used: the evaluation has its dev set.
        """
        return self._evaluation_run.run(metric_key_prefix)

    def _loop(self, batches: PrefetchedSource, checkpoints: CheckpointSeries) -> TrainingLoop:
        args = self.args
        per_rank = args.per_device_train_batch_size * args.gradient_accumulation_steps
        passes = ForwardParts(
            self.parallel,
            args.seed,
            self.autocast_smart_context_manager,
            self.parts.phases,
            label_positions=self.parts.label_positions,
            randomness=self.parts.randomness,
            overflow=self.overflow,
            objective=self.parts.objective,
            balance=self.parts.balance,
        )
        step = OptimizerStep(
            passes,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            max_grad_norm=args.max_grad_norm,
        )
        return TrainingLoop(
            step=step,
            batches=batches,
            events=self.events,
            log=self.training_log,
            phases=self.parts.phases,
            stop=StopSignal(),
            evaluate=self.evaluate,
            checkpoints=checkpoints,
            check_replicas=self.parallel.check_replicas,
            replica_check_steps=self.parts.replica_check_steps,
            global_batch_size=per_rank * self.groups.layout.data_world,
        )

    def _checkpoints(self, batches: PrefetchedSource) -> CheckpointSeries:
        run_state = RunState(
            files=self.model_files,
            writer=self.parts.writer,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            batches=batches,
            events=self.events,
            log=self.training_log,
            overflow=self.overflow,
            with_moments=not self.args.ignore_save_lr_and_optim,
        )
        continues = self.parts.continues_on_save_error
        return CheckpointSeries(self.args, run_state, self.parts.phases, continues_on_error=continues)
