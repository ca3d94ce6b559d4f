"""Whether the disk takes what a run is going to write, asked before it begins."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.checkpoints.folder import list_checkpoints
from finetune.errors import UserError
from finetune.storage.disk_failures import describe_disk_failure

if TYPE_CHECKING:
    from finetune.run.directory import RunDirectory
    from finetune.settings.arguments import Arguments
    from finetune.training.trainer import FinetuneTrainer

TRIAL_FILE = ".trial.tmp"
_TRIAL_BYTES = 1 << 16
_COMFORT = 1.5
"""Times what is needed: other programs write, too."""
_MOMENT_BYTES = 8
_FLOAT32_BYTES = 4
_MAX_FILE_BYTES = 5 * 10**9


def try_writing(folder: Path) -> None:
    """Writes a small file into a folder and removes it.

    Raises:
        UserError: The disk is full or cannot be written, or nobody allowed it.
    """
    trial = folder / TRIAL_FILE
    try:
        with open(trial, "wb") as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = describe_disk_failure(error) or error.strerror
        raise UserError(
            f"output_dir {folder} cannot be written ({reason}), or choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


@dataclass(frozen=True)
class DiskNeed:
    """What a run writes.

    Attributes:
        result_bytes: Of the final weights.
        checkpoint_bytes: Of one checkpoint: weights, two moments unless they are left out, and float32 weights where
            others are trained.
        num_checkpoints: That stand at once, with the one that is written before the oldest goes.
    """

    result_bytes: int
    checkpoint_bytes: int
    num_checkpoints: int

    @property
    def total_bytes(self) -> int:
        """Of everything at once."""
        return self.result_bytes + self.num_checkpoints * self.checkpoint_bytes


def plan_disk(args: Arguments, *, num_saved: int, num_trained: int, num_steps: int) -> DiskNeed:
    """What a run is going to write.

    Args:
        args: Its settings.
        num_saved: Parameters of the model, or of the adapter.
        num_trained: Those of them that are trained.
        num_steps: Optimizer steps of the run.
    """
    from finetune.run.model import parameter_dtype

    half = parameter_dtype(args) != "float32"
    weight_bytes = num_saved * (_FLOAT32_BYTES // 2 if half else _FLOAT32_BYTES)
    settings = args.training
    moment_bytes = 0 if settings.ignore_save_lr_and_optim else _MOMENT_BYTES
    state_bytes = num_trained * (moment_bytes + (_FLOAT32_BYTES if half else 0))
    num_saves = {
        "no": 0,
        "steps": num_steps // max(1, int(settings.save_steps)),
        "epoch": min(num_steps, math.ceil(float(settings.num_train_epochs))),
    }.get(str(settings.save_strategy), 0)
    limit = settings.save_total_limit
    kept = min(num_saves, limit + 1) if limit else num_saves
    return DiskNeed(weight_bytes, weight_bytes + state_bytes, kept)


def check_disk(run: RunDirectory, need: DiskNeed, *, free_bytes: int | None = None) -> str | None:
    """A warning where the disk is nearly full; None where it has room.

    Args:
        run: Its folder; checkpoints that stand there already are counted as written.
        need: What is written.
        free_bytes: On the disk; asked of the system by default.

    Raises:
        UserError: Not even one checkpoint and the result have room, or a limit forbids their files.
    """
    free = shutil.disk_usage(run.path).free if free_bytes is None else free_bytes
    present = min(len(list_checkpoints(run.path)), need.num_checkpoints)
    missing = need.num_checkpoints - present
    least = max(need.result_bytes, need.checkpoint_bytes if missing else 0)
    _check_file_limit(run.path, min(least, _MAX_FILE_BYTES))
    if free < least:
        raise UserError(
            f"output_dir {run.path} has {_format(free)} free, and {'one checkpoint' if missing else 'the result'} "
            f"of this run takes {_format(least)}: make room there, or choose a folder on another disk"
        )
    wanted = need.result_bytes + missing * need.checkpoint_bytes
    if free >= _COMFORT * wanted:
        return None
    return (
        f"output_dir {run.path} has {_format(free)} free, and this run writes up to {_format(wanted)} there "
        f"({missing} checkpoints of {_format(need.checkpoint_bytes)} and the result of {_format(need.result_bytes)}): "
        "make room there, or lower save_total_limit"
    )


def disk_notes(args: Arguments, run: RunDirectory, trainer: FinetuneTrainer) -> list[str]:
    """A warning where the disk is nearly full; all ranks must call it.

    Raises:
        UserError: See `check_disk`.
    """
    from finetune.processes.joint_steps import on_first

    total, trained, _ = trainer.parallel.count_parameters()
    has_adapter = args.model.lora or args.model.prefix_tuning
    num_saved = trained if has_adapter else total
    need = plan_disk(args, num_saved=num_saved, num_trained=trained, num_steps=trainer.plan_steps())
    note = on_first(trainer.groups, lambda: check_disk(run, need))
    return [f"warning: {note}"] if note else []


def _check_file_limit(folder: Path, num_bytes: int) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != resource.RLIM_INFINITY and soft < num_bytes:
        raise UserError(
            f"files of this process may have {_format(soft)}, and the run writes some of {_format(num_bytes)} to "
            f"{folder}: raise the limit (ulimit -f)"
        )


def _format(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 10**8 else f"{num_bytes / 1e6:.3g} MB"
