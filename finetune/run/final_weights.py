"""The result of a training, put into the output folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import RunError, UserError
from finetune.run.directory import TRAINED_FILE
from finetune.storage.files import read_json_object, write_json

if TYPE_CHECKING:
    from finetune.run.directory import RunDirectory
    from finetune.training.trainer import FinetuneTrainer


def save_final_weights(
    run: RunDirectory, trainer: FinetuneTrainer, metrics: dict[str, float], *, base: Path | None
) -> None:
    """Puts weights, configuration and tokenizer into the output folder, each file whole or not at all.

    Args:
        run: Where they go.
        trainer: Has trained.
        metrics: Of the training, for a process that has to take up the run's end.
        base: Folder of the model that the training started from; other parts of a multimodal one are kept.
    """
    from finetune.adapters.base import is_adapter
    from finetune.checkpoints.failed_saves import find_joint_reason
    from finetune.checkpoints.folder import FINAL_PREFIX
    from finetune.checkpoints.writers import WholeTensorWriter
    from finetune.models.other_parts import keep_other_parts
    from finetune.processes.joint_steps import fail_on_all_ranks, on_first

    groups = trainer.groups
    folder = on_first(groups, lambda: Path(tempfile.mkdtemp(prefix=FINAL_PREFIX, dir=run.path)))
    try:
        trainer.model_files.write(folder, WholeTensorWriter(groups))
        with fail_on_all_ranks(groups):
            if groups.is_first:
                facts = {"metrics": metrics, "best_step": trainer.best_step}
                write_json(folder / TRAINED_FILE, facts)
                if base is not None and not is_adapter(trainer.model):
                    keep_other_parts(base, folder)
                _move_final_files(run, trainer, folder)
    except Exception as error:
        if (reason := find_joint_reason(error, groups)) is None:
            raise
        raise RunError(
            f"the final weights cannot be saved ({reason}). Start the same command again to continue from the last "
            "checkpoint"
        ) from error
    finally:
        if groups.is_first:
            shutil.rmtree(folder, ignore_errors=True)


def take_up_final_weights(run: RunDirectory, trainer: FinetuneTrainer) -> dict[str, float]:
    """Puts final weights that stand already into the model, where a process ended before the rest of the run's end.

    Returns:
        The metrics of the training.

    Raises:
        UserError: They cannot be read.
    """
    path = run.path / TRAINED_FILE
    facts = read_json_object(path, keys=("metrics", "best_step"))
    metrics, best_step = facts["metrics"], facts["best_step"]
    is_right = isinstance(metrics, dict) and all(isinstance(value, int | float) for value in metrics.values())
    if not is_right or not isinstance(best_step, int | None):
        raise UserError(
            f"{path} cannot be used (it holds no metrics of a training): copy it again, or remove it to continue from "
            "the last checkpoint"
        )
    trainer.take_up(run.path, best_step=best_step)
    return dict(metrics)


def _move_final_files(run: RunDirectory, trainer: FinetuneTrainer, folder: Path) -> None:
    from finetune.training.run_state import STATE_FILE

    trainer.state.save_to_json(str(folder / STATE_FILE))
    run.remove_old_outputs(keep={path.name for path in folder.iterdir()})
    # The state file says that all others are there, so it goes last.
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == STATE_FILE, path.name)):
        path.replace(run.path / path.name)
    run.settle()
