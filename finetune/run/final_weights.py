"""The result of a training, put into the output folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.run.directory import RunDirectory
    from finetune.training.trainer import FinetuneTrainer


def save_final_weights(run: RunDirectory, trainer: FinetuneTrainer) -> None:
    """Puts weights, configuration and tokenizer into the output folder, each file whole or not at all."""
    from finetune.checkpoints.writers import WholeTensorWriter
    from finetune.processes.joint_steps import fail_on_all_ranks, on_first

    groups = trainer.groups
    folder = on_first(groups, lambda: Path(tempfile.mkdtemp(prefix="tmp-final-", dir=run.path)))
    try:
        trainer.model_files.write(folder, WholeTensorWriter(groups))
        with fail_on_all_ranks(groups):
            if groups.is_first:
                _move_final_files(run, trainer, folder)
    finally:
        if groups.is_first:
            shutil.rmtree(folder, ignore_errors=True)


def _move_final_files(run: RunDirectory, trainer: FinetuneTrainer, folder: Path) -> None:
    from finetune.training.run_state import STATE_FILE

    trainer.state.save_to_json(str(folder / STATE_FILE))
    run.remove_old_outputs(keep={path.name for path in folder.iterdir()})
    # The state file is what marks a finished run, so it goes last.
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == STATE_FILE, path.name)):
        path.replace(run.path / path.name)
    run.settle()
