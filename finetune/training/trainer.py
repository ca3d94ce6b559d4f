"""The training loop: PaddleNLP's Trainer with our contracts of order, loss and safety.

What comes from PaddleNLP: the arguments, optimizer, schedule, mixed precision, wrapping
for parallel training and the callbacks that decide when to log, evaluate and save. What is
ours: optimizer step k always consumes global batch k of one order that depends on the seed
alone; its loss is the sum over label tokens divided by their number in the whole global
batch; all randomness is keyed by (seed, step, sample); a checkpoint is whole or absent.
"""

from __future__ import annotations

import json
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paddle
from paddlenlp.trainer import PrinterCallback, ProgressCallback, Trainer
from paddlenlp.trainer.trainer_callback import TrainerState

from finetune.adapters.checkpoint import is_adapter, load_adapter_weights, save_adapter
from finetune.files import give_usual_mode, write_json
from finetune.interruption import Interrupted
from finetune.training.checkpoint import find_fault, rotate, step_of, write_checkpoint
from finetune.training.gradient_norm import RecordingClip
from finetune.training.loss import LabelPositions, logits_of, token_loss_sum
from finetune.training.memory import peak_memory_bytes
from finetune.training.optimizer_state import load_optimizer, load_scheduler, save_optimizer, save_scheduler
from finetune.training.seeding import derive_seed

if TYPE_CHECKING:
    from finetune.adapters.neftune import EmbeddingNoise
    from finetune.training.batch_source import BatchSource
    from finetune.training.evaluation import Evaluation
    from finetune.training.progress import ProgressReporter
    from finetune.training.rows import Batch
    from finetune.training.run_log import RunLog

STATE_FILE = "trainer_state.json"
POSITION_FILE = "data_position.json"


class FinetuneTrainer(Trainer):
    """Trains and evaluates a causal language model or an adapter on one.

    Args:
        model: PaddleNLP model, LoRAModel or PrefixModelForCausalLM.
        args: PaddleNLP's TrainingArguments.
        batches: Gives the batches of each step; None when only evaluating.
        evaluation: What `evaluate` runs, or None.
        tokenizer: PaddleNLP's tokenizer, saved beside the weights.
        label_positions: Restricts logits to labelled positions.
        noise: NEFTune noise, or None.
    """

    def __init__(
        self,
        *,
        model: Any,
        args: Any,
        batches: BatchSource | None,
        evaluation: Evaluation | None,
        tokenizer: Any,
        label_positions: LabelPositions,
        noise: EmbeddingNoise | None = None,
    ):
        super().__init__(model=model, args=args, tokenizer=tokenizer)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.batches: Any = batches
        self.model_wrapped: Any
        self.control: Any
        self.evaluation = evaluation
        self.label_positions = label_positions
        self.noise = noise
        self.progress: ProgressReporter | None = None
        self.run_log: RunLog | None = None
        self._clip = RecordingClip(args.max_grad_norm)
        self._stop_signal: int | None = None
        self._loaded_step: int | None = None
        self._totals = {"loss": 0.0, "steps": 0, "seconds": 0.0, "num_tokens": 0, "num_label_tokens": 0}
        self._interval = {"num_tokens": 0, "num_label_tokens": 0, "seconds": 0.0}
        self._last_evaluation: tuple[int, dict[str, float]] | None = None

    # ---------------------------------------------------------------- what is planned

    @property
    def global_batch_size(self) -> int:
        """Samples that one optimizer step consumes over all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.dataset_world_size

    def plan_steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        return max(1, round(self.batches.steps_per_epoch * self.args.num_train_epochs))

    def create_optimizer(self, lr_scheduler: Any = None) -> Any:
        """PaddleNLP's optimizer, with clipping that also remembers the norm for the log.

        Weight decay is for matrices: norms and biases go without. PaddleNLP tells them by the words
        "norm" and "bias" in their names, which misses the norms of families that call them `ln_1`.
        """
        optimizer = super().create_optimizer(lr_scheduler)
        optimizer._grad_clip = self._clip
        decayed = {parameter.name for parameter in self.model.parameters() if parameter.ndim > 1}
        optimizer._apply_decay_param_fun = decayed.__contains__
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
        self.create_optimizer_and_scheduler(max_steps)
        self.state = TrainerState(max_steps=max_steps, num_train_epochs=self._num_epochs(max_steps))
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        self.model_wrapped = self._wrap_model(self.model_wrapped)
        self.callback_handler.optimizer = self.optimizer
        self.callback_handler.lr_scheduler = self.lr_scheduler
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        previous = signal.signal(signal.SIGTERM, self._note_signal)
        if self.progress:
            self.progress.start()
        try:
            self._run_steps()
        finally:
            self.batches.close()
            if self.progress:
                self.progress.close()
            signal.signal(signal.SIGTERM, previous)
            self.is_in_train = False
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best(Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name)
        return self._training_metrics()

    def _load_best(self, best: Path) -> None:
        """Puts the best weights in place, or says why the last ones stay."""
        if step_of(best) == self.state.global_step:
            return
        fault = find_fault(best) if best.is_dir() else "it is gone"
        if fault:
            self.say(
                f"warning: the best checkpoint {best} cannot be used: {fault}. The last weights are kept."
            )
            return
        self._load_weights(best)
        self._loaded_step = step_of(best)
        self._last_evaluation = None

    def say(self, text: str) -> None:
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
        batches = self.batches.micro_batches(step)
        num_label_tokens = sum(batch.num_label_tokens for batch in batches)
        loss = 0.0
        for number, batch in enumerate(batches):
            paddle.seed(derive_seed(self.args.seed, "step", step, number))
            loss += self._forward_backward(batch, step, num_label_tokens)
        self._check_finite(loss, step)
        learning_rate = float(self.lr_scheduler.get_lr())
        self._update_weights()
        num_tokens = sum(batch.num_tokens for batch in batches)
        return self._count(loss, num_tokens, num_label_tokens) | {"learning_rate": learning_rate}

    def _forward_backward(self, batch: Batch, step: int, num_label_tokens: int) -> float:
        """Adds one micro-batch's gradients; returns its share of the step's loss."""
        noise = self.noise.active(step, batch.segments) if self.noise else nullcontext()
        with noise, self.label_positions.only(paddle.to_tensor(batch.labels)) as label_ids:
            with self.autocast_smart_context_manager():
                logits = logits_of(self.model_wrapped(**batch.tensors()))
            loss = token_loss_sum(logits, label_ids) / num_label_tokens
            (self.scaler.scale(loss) if self.do_grad_scaling else loss).backward()
        return float(loss)

    def _update_weights(self) -> None:
        if self.do_grad_scaling:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.clear_grad()

    def _check_finite(self, loss: float, step: int) -> None:
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise FloatingPointError(
                f"the loss of step {step + 1} is {loss}: the weights of the last checkpoint are still good. "
                "Lower learning_rate, raise warmup_steps, or look for broken samples in this step's batch."
            )

    def _count(self, loss: float, num_tokens: int, num_label_tokens: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        for totals in (self._totals, self._interval):
            totals["num_tokens"] += num_tokens
            totals["num_label_tokens"] += num_label_tokens
            totals["seconds"] += seconds
        self._totals["loss"] += loss
        self._totals["steps"] += 1
        return {"loss": loss, "num_tokens": num_tokens}

    def _after_step(self, record: dict[str, float]) -> None:
        """Logs, evaluates and saves where the callbacks asked for it."""
        record = {"step": self.state.global_step, "epoch": self.state.epoch} | record
        if self.progress:
            self.progress.step(record)
        if self.control.should_log or self.state.global_step == self.state.max_steps:
            self._log_step(record)
        metrics = self.evaluate() if self.control.should_evaluate else None
        if self.control.should_save or self._stop_signal:
            self._save_checkpoint(self.model_wrapped, metrics)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if self._stop_signal and self.state.global_step < self.state.max_steps:
            raise Interrupted(
                f"stopped by signal {signal.Signals(self._stop_signal).name} after step {self.state.global_step} "
                f"of {self.state.max_steps}; it is saved, start the same command again to continue"
            )
        if metrics is not None or self.control.should_save:
            self._mark = time.perf_counter()

    def _log_step(self, record: dict[str, float]) -> None:
        interval, self._interval = self._interval, dict.fromkeys(self._interval, 0)
        record = {
            **{key: record[key] for key in ("step", "epoch", "loss", "learning_rate")},
            "grad_norm": self._clip.last_norm(),
            "num_tokens": int(interval["num_tokens"]),
            "num_label_tokens": int(interval["num_label_tokens"]),
            "tokens_per_second": interval["num_tokens"] / max(interval["seconds"], 1e-9),
            "seconds": self._totals["seconds"],
            "memory_bytes": peak_memory_bytes(),
        }
        if self.run_log:
            self.run_log.step(record)
        if self.progress:
            self.progress.log(record)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, dict(record))

    def _note_signal(self, number: int, _frame: Any) -> None:
        self._stop_signal = number

    def _training_metrics(self) -> dict[str, float]:
        totals = self._totals
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
        self.model.eval()
        watch = (
            self.progress.evaluating(self.evaluation.num_batches, self.evaluation.label)
            if self.progress
            else nullcontext(lambda: None)
        )
        with watch as advance, self.autocast_smart_context_manager():
            raw = self.evaluation.run(self.model, advance)
        self.model.train()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in raw.items()}
        record = {"step": step, "epoch": self.state.epoch or 0.0} | metrics
        record[f"{metric_key_prefix}_seconds"] = time.perf_counter() - began
        if self._loaded_step is not None:
            self.say(f"The best checkpoint is that of step {step}")
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
        newest = write_checkpoint(output_dir, self.state.global_step, self._write_checkpoint_files)
        best = self.state.best_model_checkpoint
        best_path = output_dir / Path(best).name if best else None
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

    def _write_checkpoint_files(self, folder: Path) -> None:
        self.write_model(folder)
        save_optimizer(folder, self.model, self.optimizer)
        save_scheduler(folder, self.lr_scheduler, self.scaler if self.do_grad_scaling else None)
        position = self.batches.save(folder, self.state.global_step)
        counts = {"totals": self._totals, "interval": self._interval}
        write_json(folder / POSITION_FILE, position | counts)
        self.state.save_to_json(str(folder / STATE_FILE))

    def write_model(self, folder: Path) -> None:
        """Writes weights or adapter, configuration and tokenizer files into a folder."""
        if is_adapter(self.model):
            save_adapter(self.model, folder, num_tokens=len(self.tokenizer))
        else:
            self.model.save_pretrained(str(folder), safe_serialization=True, max_shard_size="5GB")
        self.tokenizer.save_pretrained(str(folder))
        for path in folder.glob("*.safetensors"):
            give_usual_mode(path)

    def _restore(self, checkpoint: Path) -> None:
        """Takes up weights, optimizer, schedule and position where a checkpoint left them."""
        self._load_weights(checkpoint)
        load_optimizer(checkpoint, self.model, self.optimizer)
        load_scheduler(checkpoint, self.lr_scheduler, self.scaler if self.do_grad_scaling else None)
        saved = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        saved.max_steps, saved.num_train_epochs = self.state.max_steps, self.state.num_train_epochs
        self.state = saved
        position = _read_position(checkpoint)
        note = self.batches.restore(checkpoint, position)
        self._totals |= position["totals"]
        self._interval |= position["interval"]
        if note:
            self.say(note)

    def _load_weights(self, folder: Path) -> None:
        if is_adapter(self.model):
            load_adapter_weights(self.model, folder)
        else:
            from finetune.models.loading import load_weights

            load_weights(self.model, folder)


def _read_position(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / POSITION_FILE).read_text(encoding="utf-8"))
