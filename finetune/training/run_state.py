"""What a checkpoint of a run holds, to files and back."""

from __future__ import annotations

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
    return read_json_object(checkpoint / POSITION_FILE, keys=("totals", "interval"))


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """PaddleNLP's record of a run up to a checkpoint.

    Raises:
        UserError: The file cannot be read or is another one.
    """
    path = checkpoint / STATE_FILE
    fields = read_json_object(path)
    try:
        return TrainerState(**fields)
    except TypeError as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None


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
        load_scheduler(checkpoint, trainer.lr_scheduler, self._scaler)
        if trainer.overflow:
            trainer.overflow.read_scale()
        saved = read_trainer_state(checkpoint)
        saved.max_steps, saved.num_train_epochs = trainer.state.max_steps, trainer.state.num_train_epochs
        trainer.state = saved
        position = read_position(checkpoint)
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
