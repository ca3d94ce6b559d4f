"""Steps on the longest rows, to see whether memory is enough: `longest_first`.

A trial is a training of its own, in a folder of its own that goes with it. The order of the run that follows is what it
would be without it: steps 0, 1, ... of the one global order.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.processes.launch import is_first_process
from finetune.run.directory import ARGUMENTS_FILE
from finetune.storage.files import read_json_or_empty

if TYPE_CHECKING:
    from finetune.run.report import Report
    from finetune.settings.arguments import Arguments
    from finetune.training.trainer import FinetuneTrainer

ENDING = ".longest_first"
"""Of the folder that a trial writes to, beside the output folder of its run."""
_NEVER = "no"
_GIBIBYTE = 1 << 30


@contextmanager
def as_trial(args: Arguments) -> Iterator[Arguments]:
    """The settings of a trial within the block: as many steps, no evaluation, no checkpoint; then its folder goes.

    Args:
        args: Settings of the run.

    Raises:
        UserError: Something else stands where the folder would be.
    """
    training = copy.copy(args.training)
    folder = Path(str(training.output_dir)).expanduser()
    folder = folder.with_name(folder.name + ENDING)
    _check_folder(folder)
    changes = dict(
        output_dir=str(folder),
        overwrite_output_dir=True,
        resume_from_checkpoint=None,
        max_steps=args.data.longest_first,
        do_eval=False,
        evaluation_strategy=_NEVER,
        save_strategy=_NEVER,
        load_best_model_at_end=False,
        report_to=[],
    )
    training.__dict__.update(changes)
    try:
        yield dataclasses.replace(args, training=training, given=args.given | set(changes))
    finally:
        if is_first_process():
            shutil.rmtree(folder, ignore_errors=True)


def _check_folder(folder: Path) -> None:
    """A folder of that name goes at the end: it has to be what an earlier trial left when it was killed."""
    is_left = bool(read_json_or_empty(folder / ARGUMENTS_FILE).get("longest_first"))
    if folder.exists() and not is_left:
        raise UserError(
            f"longest_first writes to {folder} and removes it, but something else is there: move it, or choose another "
            "output_dir"
        )


def run_trial(trainer: FinetuneTrainer, report: Report) -> None:
    """Trains the steps of a trial and tells the most memory that any process needed; all ranks must call it."""
    from finetune.reporting.memory import peak_memory_bytes, peak_tensor_bytes

    metrics = trainer.train(None)
    found = trainer.groups.world.gather_objects([peak_tensor_bytes(), peak_memory_bytes()])
    tensors, whole = (max(each[place] for each in found) for place in (0, 1))
    report.show_message(
        f"{trainer.state.global_step} steps on the longest rows are done and nothing was saved. Most memory of a "
        f"{'process' if whole != tensors else 'card'}: {_gibibytes(tensors)} of tensors"
        + (f", {_gibibytes(whole)} with all that was loaded" if whole != tensors else "")
        + f"; {metrics['train_tokens_per_second']:,.0f} tokens/s"
    )


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / _GIBIBYTE:.3f} GiB"
