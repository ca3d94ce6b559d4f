"""The training loop: PaddleNLP's Trainer with our contracts of order, loss and safety.

What comes from PaddleNLP: the arguments, optimizer, schedule, mixed precision, wrapping
for parallel training and the callbacks that decide when to log, evaluate and save. What is
ours: optimizer step k always consumes global batch k of one order that depends on the seed
alone; its loss is the sum over label tokens divided by their number in the whole global
batch; all randomness is keyed by (seed, step, sample); a checkpoint is whole or absent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddlenlp.trainer import PrinterCallback, ProgressCallback, Trainer
from paddlenlp.trainer.trainer_callback import TrainerState

from finetune.checkpoints.folder import find_fault, rotate, step_of, write_checkpoint
from finetune.parallel.parallel_model import ParallelModel
from finetune.processes.groups import ProcessGroups
from finetune.processes.joint_steps import fail_on_all_ranks, on_first
from finetune.processes.phases import enter_phase
from finetune.reporting.memory import peak_memory_bytes
from finetune.training.gradient_norm import clip_factor
from finetune.training.overflow import OverflowGuard, check_finite
from finetune.training.prefetch import PrefetchedSource
from finetune.training.run_state import SavedState
from finetune.training.step import StepComputation, end_step
from finetune.training.stop_signal import StopSignal

if TYPE_CHECKING:
    from finetune.data.batches.batch_source import BatchSource
    from finetune.parallel.pipe.stage import Stage
    from finetune.randomness.source import Randomness
    from finetune.reporting.progress import ProgressReporter
    from finetune.reporting.run_log import RunLog
    from finetune.training.evaluation import Evaluation
    from finetune.training.loss import LabelPositions


class FinetuneTrainer(Trainer):
    """Trains and evaluates a causal language model or an adapter on one.

    Args:
        model: PaddleNLP model, LoRAModel or PrefixModelForCausalLM.
        args: PaddleNLP's TrainingArguments.
        batches: Gives the batches of each step; None when only evaluating.
        evaluation: What `evaluate` runs, or None.
        tokenizer: PaddleNLP's tokenizer, saved beside the weights.
        label_positions: Restricts logits to labelled positions; None where no logits are computed.
        randomness: What draws by sample, such as NEFTune noise and dropout.
        groups: The run's process groups.
        stage: This rank's stage of the pipeline, or None.
        sharding_stage: 0 to 3.
        layers: Decoder layers of this rank.
        unified: Whether checkpoints hold whole tensors, or a file for each rank.
        replica_check_steps: Steps between comparisons of what ranks must agree on; 0: at start and saves only.
        master_gradients: Whether gradients are added up in float32 whatever the parameters' dtype.
        max_skipped_steps: float16 steps skipped in a row after which training stops.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        batches: BatchSource | None,
        evaluation: Evaluation | None,
        tokenizer: Any,
        label_positions: LabelPositions | None,
        randomness: Sequence[Randomness] = (),
        groups: ProcessGroups | None = None,
        stage: Stage | None = None,
        sharding_stage: int = 0,
        layers: Sequence[Any] = (),
        unified: bool = True,
        replica_check_steps: int = 0,
        master_gradients: bool = False,
        max_skipped_steps: int = 20,
    ):
        super().__init__(model=model, args=args, tokenizer=tokenizer)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.batches: Any = batches
        self.model_wrapped: Any
        self.control: Any
        self.evaluation = evaluation
        self.label_positions = label_positions
        self.randomness = randomness
        self.unified, self.replica_check_steps = unified, replica_check_steps
        self.groups = groups or ProcessGroups()
        self.parallel = ParallelModel(
            model,
            self.groups,
            stage=stage,
            sharding_stage=sharding_stage,
            layers=layers,
            master_gradients=master_gradients,
        )
        self.overflow = OverflowGuard(self.scaler, max_skipped_steps) if self.do_grad_scaling else None
        self.saved = SavedState(self)
        self.progress: ProgressReporter | None = None
        self.run_log: RunLog | None = None
        self._norm = float("nan")
        self.stop_signal = StopSignal()
        self._stops = False
        self._loaded_step: int | None = None
        self.totals = {"loss": 0.0, "steps": 0, "seconds": 0.0, "num_tokens": 0, "num_label_tokens": 0}
        self.interval = {"num_tokens": 0, "num_label_tokens": 0, "seconds": 0.0}
        self._last_evaluation: tuple[int, dict[str, float]] | None = None

    # ---------------------------------------------------------------- what is planned

    @property
    def global_batch_size(self) -> int:
        """Samples that one optimizer step consumes over all processes."""
        args = self.args
        per_rank = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return per_rank * self.groups.layout.data_world

    def plan_steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        return max(1, round(self.batches.steps_per_epoch * self.args.num_train_epochs))

    def create_optimizer(self, lr_scheduler: Any = None) -> Any:
        """PaddleNLP's optimizer on what this rank updates; clipping is done before it is called.

        Weight decay is for matrices: norms and biases go without. PaddleNLP tells them by the words
        "norm" and "bias" in their names, which misses the norms of families that call them `ln_1`.
        """
        replicas = self.parallel.replicas
        self.optimizer_grouped_parameters = replicas.optimizer_parameters()
        optimizer = super().create_optimizer(lr_scheduler)
        optimizer._grad_clip = None
        optimizer._apply_decay_param_fun = replicas.is_decayed
        return optimizer

    # ---------------------------------------------------------------- training

    def train(self, resume_from_checkpoint: str | Path | None = None) -> dict[str, float]:
        """Trains to the last step, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: A valid checkpoint folder of the same run, or None.

        Returns:
            Totals of the training: mean loss, steps, seconds, tokens, tokens per second.

        Raises:
            Interrupted: SIGTERM arrived; the step in progress was finished and saved first.
        """
        self.is_in_train = True
        max_steps = self.plan_steps()
        self.batches = PrefetchedSource(self.batches, max_steps)
        self.create_optimizer_and_scheduler(max_steps)
        self.state = TrainerState(max_steps=max_steps, num_train_epochs=self._num_epochs(max_steps))
        if resume_from_checkpoint is not None:
            self.saved.restore(Path(resume_from_checkpoint))
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.lr_scheduler = self.lr_scheduler
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        with self.stop_signal.noted():
            if self.progress:
                self.progress.start()
            self._check_replicas("at the start")
            try:
                self._run_steps()
            finally:
                if note := self.batches.close():
                    self.show_message(note)
                if self.progress:
                    self.progress.close()
                self.is_in_train = False
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best(Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name)
        return self._training_metrics()

    def _check_replicas(self, what: str) -> None:
        enter_phase("comparing replicas", self.state.global_step)
        self.parallel.check_replicas(what)

    def _load_best(self, best: Path) -> None:
        """Puts the best weights in place, or says why the last ones stay."""
        if step_of(best) == self.state.global_step:
            return
        fault = on_first(self.groups, lambda: find_fault(best) if best.is_dir() else "it is gone")
        if fault:
            self.show_message(
                f"warning: the best checkpoint {best} cannot be used: {fault}. The last weights are kept."
            )
            return
        self.saved.load_weights(best)
        self._loaded_step = step_of(best)
        self._last_evaluation = None

    def show_message(self, text: str) -> None:
        """Shows a line to the person, above the progress bar."""
        if self.progress:
            self.progress.message(text)

    def _num_epochs(self, max_steps: int) -> int:
        steps_per_epoch = self.batches.steps_per_epoch
        return -(-max_steps // steps_per_epoch) if steps_per_epoch else 1

    def _run_steps(self) -> None:
        self.model_wrapped.train()
        self._mark = time.perf_counter()
        while self.state.global_step < self.state.max_steps:
            step = self.state.global_step
            record = self._optimizer_step(step)
            self.state.global_step = step + 1
            self.state.epoch = self.batches.epoch(step + 1)
            self.state.consumed_samples = (step + 1) * self.global_batch_size
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            if self.batches.ends_epoch(step + 1) or self.state.global_step == self.state.max_steps:
                self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._after_step(record)

    def _optimizer_step(self, step: int) -> dict[str, float]:
        """Forward, backward and update for global batch `step`; the figures of its log record."""
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
        enter_phase("reading", step + 1)
        batch = self.batches.batch(step)
        if batch.note:
            self.show_message(batch.note)
        share = self.parallel.train(StepComputation(self, step, batch), len(batch.micro_batches))
        enter_phase("gradients", step + 1)
        loss, norm, self._stops = end_step(
            self.parallel, batch, share, stop=self.stop_signal.number is not None
        )
        scale = self.overflow.scale if self.overflow else 1.0
        loss, self._norm = loss / scale, norm / scale
        learning_rate = float(self.lr_scheduler.get_lr())
        if self.overflow:
            facts = self.overflow.check(loss, self._norm, step)
        else:
            facts = {}
            check_finite(loss, self._norm, step)
        self._update_weights(skips="skipped" in facts)
        figures = self._count(loss, batch.num_tokens, batch.num_label_tokens)
        return figures | {"learning_rate": learning_rate} | facts

    def _update_weights(self, *, skips: bool) -> None:
        """Clips and lets the optimizer step.

        Args:
            skips: Whether gradients overflowed in float16: weights, optimizer state and schedule then stay.
        """
        enter_phase("update", self.state.global_step + 1)
        replicas = self.parallel.replicas
        factor = 1.0 if skips else clip_factor(self._norm, self.args.max_grad_norm)
        if factor != 1.0:
            replicas.scale_gradients(factor)
        if self.overflow:
            self.overflow.step(self.optimizer, skips=skips)
        else:
            self.optimizer.step()
        if not skips:
            replicas.after_update()
            self.lr_scheduler.step()
        replicas.clear_gradients()

    def _count(self, loss: float, num_tokens: int, num_label_tokens: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        for totals in (self.totals, self.interval):
            totals["num_tokens"] += num_tokens
            totals["num_label_tokens"] += num_label_tokens
            totals["seconds"] += seconds
        if math.isfinite(loss):
            self.totals["loss"] += loss
            self.totals["steps"] += 1
        return {"loss": loss, "num_tokens": num_tokens}

    def _after_step(self, record: dict[str, float]) -> None:
        """Logs, evaluates and saves where the callbacks asked for it."""
        record = {"step": self.state.global_step, "epoch": self.state.epoch} | record
        if "skipped" in record and self.overflow:
            self.show_message(
                f"step {self.state.global_step} skipped: float16 overflowed at a loss scale of "
                f"{record['loss_scale']:g}; the next one is {self.overflow.scale:g}"
            )
        if self.progress:
            self.progress.step(record)
        if self.control.should_log or self.state.global_step == self.state.max_steps or "skipped" in record:
            self._log_step(record)
        metrics = self.evaluate() if self.control.should_evaluate else None
        if self.replica_check_steps and self.state.global_step % self.replica_check_steps == 0:
            self._check_replicas(f"after step {self.state.global_step}")
        if self.control.should_save or self._stops:
            self._check_replicas(f"after step {self.state.global_step}")
            self._save_checkpoint(self.model_wrapped, metrics)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if self._stops and self.state.global_step < self.state.max_steps:
            self.stop_signal.end_run(self.state.global_step, self.state.max_steps)
        if metrics is not None or self.control.should_save:
            self._mark = time.perf_counter()

    def _log_step(self, record: dict[str, float]) -> None:
        interval, self.interval = self.interval, dict.fromkeys(self.interval, 0)
        record = {
            **{key: record[key] for key in ("step", "epoch", "loss", "learning_rate")},
            "grad_norm": self._norm,
            "num_tokens": int(interval["num_tokens"]),
            "num_label_tokens": int(interval["num_label_tokens"]),
            "tokens_per_second": interval["num_tokens"] / max(interval["seconds"], 1e-9),
            "seconds": self.totals["seconds"],
            "memory_bytes": peak_memory_bytes(),
            **{key: record[key] for key in ("loss_scale", "skipped") if key in record},
        }
        if self.run_log:
            self.run_log.step(record)
        if self.progress:
            self.progress.log(record)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, dict(record))

    def _training_metrics(self) -> dict[str, float]:
        totals = self.totals
        return {
            "train_loss": totals["loss"] / max(totals["steps"], 1),
            "train_steps": totals["steps"],
            "train_seconds": totals["seconds"],
            "train_num_tokens": totals["num_tokens"],
            "train_num_label_tokens": totals["num_label_tokens"],
            "train_tokens_per_second": totals["num_tokens"] / max(totals["seconds"], 1e-9),
        }

    # ---------------------------------------------------------------- evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Runs the evaluation of this run on the current weights and logs its metrics.

        The same step is not evaluated twice. `eval_dataset` and `ignore_keys` are PaddleNLP's
        parameters and not used: the dev set belongs to the evaluation given at construction.

        Returns:
            Metrics by name, each with the prefix "eval_".
        """
        step = self._loaded_step if self._loaded_step is not None else self.state.global_step
        if self._last_evaluation and self._last_evaluation[0] == step:
            return self._last_evaluation[1]
        assert self.evaluation is not None
        began = time.perf_counter()
        enter_phase("evaluation", step)
        self.model.eval()
        watch = (
            self.progress.evaluating(self.evaluation.num_batches, self.evaluation.label)
            if self.progress
            else nullcontext(lambda: None)
        )
        with watch as advance, self.autocast_smart_context_manager():
            raw = self.evaluation.run(self.parallel, advance)
        self.model.train()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in raw.items()}
        record = {"step": step, "epoch": self.state.epoch or 0.0} | metrics
        record[f"{metric_key_prefix}_seconds"] = time.perf_counter() - began
        if self._loaded_step is not None:
            self.show_message(f"The best checkpoint is that of step {step}")
        elif self.run_log:  # the best weights were evaluated and logged when they were saved
            self.run_log.evaluation(record)
        if self.progress:
            self.progress.evaluation(record)
        self.callback_handler.on_log(self.args, self.state, self.control, dict(record))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._last_evaluation = (step, metrics)
        return metrics

    # ---------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: Any, metrics: dict[str, float] | None = None) -> None:
        output_dir = Path(self.args.output_dir)
        self._note_best(metrics)
        enter_phase("saving", self.state.global_step)
        newest = write_checkpoint(output_dir, self.state.global_step, self.saved.write, self.groups)
        best = self.state.best_model_checkpoint
        best_path = output_dir / Path(best).name if best else None
        with fail_on_all_ranks(self.groups):
            if self.groups.is_first:
                rotate(output_dir, keep=self.args.save_total_limit, best=best_path, newest=newest)

    def _note_best(self, metrics: dict[str, float] | None) -> None:
        if metrics is None or self.args.metric_for_best_model is None:
            return
        name = self.args.metric_for_best_model
        value = metrics[name if name.startswith("eval_") else f"eval_{name}"]
        best = self.state.best_metric
        if best is None or (value > best if self.args.greater_is_better else value < best):
            self.state.best_metric = value
            self.state.best_model_checkpoint = f"checkpoint-{self.state.global_step}"
