"""What a checkpoint of a run holds, to files and back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paddlenlp.trainer.trainer_callback import TrainerState

from finetune.adapters.base import is_adapter
from finetune.adapters.files import load_adapter_weights, save_adapter
from finetune.checkpoints.optimizer_state import (
    load_optimizer,
    load_scheduler,
    save_optimizer,
    save_scheduler,
)
from finetune.checkpoints.tensors_of_ranks import save_model_weights
from finetune.errors import UserError
from finetune.models.loading import load_weights
from finetune.processes.joint_steps import fail_on_all_ranks
from finetune.storage.files import read_json_object, write_json

if TYPE_CHECKING:
    from finetune.training.trainer import FinetuneTrainer

STATE_FILE = "trainer_state.json"
POSITION_FILE = "data_position.json"


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


class SavedState:
    """Writes and restores the state of a trainer; all ranks call every method.

    Args:
        trainer: Whose state.
    """

    def __init__(self, trainer: FinetuneTrainer):
        self._trainer = trainer

    def write(self, folder: Path) -> None:
        """Writes weights, optimizer, schedule and position into an empty folder."""
        trainer = self._trainer
        self.write_model(folder, unified=trainer.unified)
        save_optimizer(
            folder,
            trainer.model,
            trainer.optimizer,
            trainer.groups,
            replicas=trainer.parallel.replicas,
            unified=trainer.unified,
        )
        with fail_on_all_ranks(trainer.groups):
            if trainer.groups.is_first:
                self._write_position(folder)

    def _write_position(self, folder: Path) -> None:
        trainer = self._trainer
        save_scheduler(folder, trainer.lr_scheduler, self._scaler)
        position = trainer.batches.save(folder, trainer.state.global_step)
        counts = {"totals": trainer.totals, "interval": trainer.interval}
        write_json(folder / POSITION_FILE, position | counts)
        trainer.state.save_to_json(str(folder / STATE_FILE))

    @property
    def _scaler(self) -> Any:
        """What scales the loss of float16 runs, None in others."""
        return self._trainer.scaler if self._trainer.do_grad_scaling else None

    def write_model(self, folder: Path, *, unified: bool = True) -> None:
        """Writes weights or adapter, configuration and tokenizer files into a folder.

        Args:
            folder: The same on all ranks.
            unified: Whether files hold whole tensors; otherwise one file for each rank that has a part.
        """
        trainer = self._trainer
        model, groups, whole = trainer.model, trainer.groups, trainer.parallel.replicas.whole_parameters
        if is_adapter(model):
            num_tokens = len(trainer.tokenizer)
            save_adapter(model, folder, groups, num_tokens=num_tokens, unified=unified, whole=whole)
        else:
            save_model_weights(model, folder, groups, unified=unified, whole=whole)
        with fail_on_all_ranks(groups):
            if groups.is_first:
                trainer.tokenizer.save_pretrained(str(folder))

    def restore(self, checkpoint: Path) -> None:
        """Takes up weights, optimizer, schedule and position where a checkpoint left them."""
        trainer = self._trainer
        self.load_weights(checkpoint)
        load_optimizer(checkpoint, trainer.model, trainer.optimizer, replicas=trainer.parallel.replicas)
        with _values_of(checkpoint):
            load_scheduler(checkpoint, trainer.lr_scheduler, self._scaler)
        if trainer.overflow:
            trainer.overflow.read_scale()
        saved = read_trainer_state(checkpoint)
        saved.max_steps, saved.num_train_epochs = trainer.state.max_steps, trainer.state.num_train_epochs
        trainer.state = saved
        position = read_position(checkpoint)
        with _values_of(checkpoint):
            note = trainer.batches.restore(checkpoint, position)
        trainer.totals |= position["totals"]
        trainer.interval |= position["interval"]
        if note:
            trainer.show_message(note)

    def load_weights(self, folder: Path) -> None:
        """Sets the weights, or those of the adapter, to what a checkpoint holds."""
        trainer = self._trainer
        with trainer.parallel.replicas.whole_parameters():
            if is_adapter(trainer.model):
                load_adapter_weights(trainer.model, folder)
            else:
                load_weights(trainer.model, folder)
