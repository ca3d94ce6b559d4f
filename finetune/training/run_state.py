"""What a checkpoint of a run holds, to files and back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddlenlp.trainer.trainer_callback import TrainerState

from finetune.adapters.base import is_adapter
from finetune.checkpoints.folder import lacks_moments
from finetune.checkpoints.optimizer_state import load_optimizer, save_optimizer
from finetune.checkpoints.scheduler_state import load_scheduler, save_scheduler
from finetune.errors import UserError
from finetune.processes.joint_steps import fail_on_all_ranks
from finetune.storage.files import read_json_object, write_json

if TYPE_CHECKING:
    from finetune.checkpoints.writers import TensorSetWriter
    from finetune.training.events import CallbackEvents
    from finetune.training.model_files import ModelFiles
    from finetune.training.overflow import OverflowGuard
    from finetune.training.prefetch import PrefetchedSource
    from finetune.training.training_log import TrainingLog

STATE_FILE = "trainer_state.json"
POSITION_FILE = "data_position.json"
_TRAINED = "trained_parameters"


def read_position(checkpoint: Path) -> dict[str, Any]:
    """Where a checkpoint stands in the data, and the sums of its metrics.

    Raises:
        UserError: The file cannot be read or is another one.
    """
    path = checkpoint / POSITION_FILE
    position = read_json_object(path, keys=("totals", "interval"))
    for name in ("totals", "interval"):
        sums = position[name]
        if not isinstance(sums, dict) or not all(isinstance(value, int | float) for value in sums.values()):
            raise UserError(f"{path} cannot be used ({name} holds no sums): copy it again")
    return position


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """PaddleNLP's record of a run up to a checkpoint.

    Raises:
        UserError: The file cannot be read or is another one.
    """
    path = checkpoint / STATE_FILE
    fields = read_json_object(path)
    try:
        state = TrainerState(**fields)
    except TypeError as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None
    if fault := _find_wrong_field(state):
        raise UserError(f"{path} cannot be used ({fault}): copy it again")
    return state


def _find_wrong_field(state: TrainerState) -> str | None:
    """Which field holds another kind of value than it has in a new state; None when all are right."""
    for name, default in vars(TrainerState()).items():
        value = getattr(state, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name == "log_history":
            is_right = isinstance(value, list) and all(isinstance(each, dict) for each in value)
        elif name == "best_metric":
            is_right = value is None or is_number
        elif isinstance(default, int | float) and not isinstance(default, bool):
            is_right = is_number and isinstance(value, type(default) | int)
        else:
            is_right = default is None or isinstance(value, type(default))
        if not is_right:
            return f"{name} is {json.dumps(value)[:60]}"
    best = state.best_model_checkpoint
    return None if best is None or isinstance(best, str) else "best_model_checkpoint is no text"


@contextmanager
def _values_of(checkpoint: Path) -> Iterator[None]:
    """Has a value of a checkpoint's files that is of another kind than what was written end in a message."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{checkpoint} holds values that no run writes ({type(error).__name__}: {error}): copy the folder again, or "
            "remove it to continue from the checkpoint before"
        ) from error


@dataclass(frozen=True)
class RunState:
    """Writes and restores the state of a training; all ranks call every method.

    Attributes:
        files: The model.
        writer: How its tensors and those of the optimizer become files.
        optimizer: Of what this rank updates.
        lr_scheduler: Its learning rate.
        batches: Know their position in the data.
        events: Hold PaddleNLP's state.
        log: Holds sums over the steps.
        overflow: Holds the loss scale of float16 runs; None in others.
        with_moments: Whether checkpoints hold what the optimizer has gathered.
    """

    files: ModelFiles
    writer: TensorSetWriter
    optimizer: Any
    lr_scheduler: Any
    batches: PrefetchedSource
    events: CallbackEvents
    log: TrainingLog
    overflow: OverflowGuard | None = None
    with_moments: bool = True

    @property
    def _scaler(self) -> Any:
        return self.overflow.scaler if self.overflow else None

    def write(self, folder: Path) -> None:
        """Writes weights, optimizer, schedule and position into an empty folder."""
        files = self.files
        files.write(folder, self.writer)
        trained = self._describe_trained()
        save_optimizer(
            folder,
            files.model,
            self.optimizer,
            self.writer,
            replicas=files.replicas,
            with_moments=self.with_moments,
        )
        with fail_on_all_ranks(files.groups):
            if files.groups.is_first:
                self._write_position(folder, trained)

    def _describe_trained(self) -> dict[str, Any]:
        """Number and hash of the names of what is trained of a model without adapter; all ranks must call it."""
        if is_adapter(self.files.model):
            return {}
        parts = self.files.groups.pipeline.gather_objects(sorted(self.files.replicas.trained))
        names = sorted({name for part in parts for name in part})
        return {"number": len(names), "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}

    def _check_trained(self, checkpoint: Path) -> None:
        """Refuses a checkpoint of a run that trained other parameters; those of earlier versions do not tell."""
        saved, own = read_position(checkpoint).get(_TRAINED), self._describe_trained()
        if saved and own and saved != own:
            raise UserError(
                f"{checkpoint} was written by a run that trained other parameters than this one ({saved['number']} "
                f"tensors, here {own['number']}): continue with the same freeze_layers, freeze_parameters, "
                "freeze_parameters_ratio and trainable_parameters, or begin a new run with model_name_or_path set to it"
            )

    def _write_position(self, folder: Path, trained: dict[str, Any]) -> None:
        save_scheduler(folder, self.lr_scheduler, self._scaler)
        position = self.batches.save(folder, self.events.state.global_step)
        counts: dict[str, Any] = dict(self.log.counts())
        if self.overflow:
            counts["skipped_steps"] = self.overflow.counts()
        if trained:
            counts[_TRAINED] = trained
        write_json(folder / POSITION_FILE, position | counts)
        self.events.state.save_to_json(str(folder / STATE_FILE))

    def restore(self, checkpoint: Path) -> None:
        """Takes up weights, optimizer, schedule and position where a checkpoint left them, and says what it lacks."""
        files, state = self.files, self.events.state
        self._check_trained(checkpoint)
        files.load_weights(checkpoint)
        is_stage = files.groups.pipeline.size > 1
        load_optimizer(checkpoint, files.model, self.optimizer, replicas=files.replicas, is_stage=is_stage)
        with _values_of(checkpoint):
            load_scheduler(checkpoint, self.lr_scheduler, self._scaler)
        saved = read_trainer_state(checkpoint)
        saved.max_steps, saved.num_train_epochs = state.max_steps, state.num_train_epochs
        self.events.set_state(saved)
        position = read_position(checkpoint)
        with _values_of(checkpoint):
            note = self.batches.restore(checkpoint, position)
            self.log.restore(position)
            if self.overflow:
                self.overflow.restore(position.get("skipped_steps", {}))
        if note:
            self.log.show_message(note)
        if lacks_moments(checkpoint):
            self.log.show_message(
                f"{checkpoint.name} holds no moments of the optimizer (ignore_save_lr_and_optim): they start anew, "
                "while weights, learning-rate schedule and order of the data go on"
            )
