"""The output folder of a run: who may write to it, what is in it, where to continue."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.files import write_json
from finetune.training.checkpoint import (
    find_fault,
    list_checkpoints,
    newest_valid_checkpoint,
    remove_leftovers,
    set_aside,
    step_of,
)

if TYPE_CHECKING:
    from finetune.arguments import Arguments

ARGUMENTS_FILE = "arguments.json"
FINISHED_FILE = "trainer_state.json"
LOCK_FILE = ".lock"
_MAY_CHANGE = {
    "disable_tqdm", "resume_from_checkpoint", "logging_steps", "save_steps", "save_total_limit", "device",
    "per_device_eval_batch_size", "report_to", "overwrite_output_dir", "save_generation_output", "eval_steps",
}  # fmt: skip
"""Settings that do not change the curve of a run; all others are named when a resumed run changes them."""


class RunDirectory:
    """An output folder that this process holds, and the checkpoint to continue from.

    Attributes:
        path: The folder.
        resume: The checkpoint that training continues from, or None for a fresh start.
        warnings: What the person should know before training starts.
    """

    def __init__(self, path: Path):
        self.path = path
        self.resume: Path | None = None
        self.warnings: list[str] = []
        self._lock: IO[str] | None = None

    @property
    def resume_step(self) -> int | None:
        """Optimizer steps done at the checkpoint to continue from, None for a fresh start."""
        return None if self.resume is None else step_of(self.resume)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._lock:
            self._lock.close()

    def take_lock(self) -> None:
        """Refuses a second run in the same folder while this one lives."""
        self._lock = open(self.path / LOCK_FILE, "w")  # noqa: SIM115  (held as long as the run)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"output_dir {self.path} is in use by another running process: wait for it, or choose another folder."
            ) from None

    def note_changes(self, arguments: dict[str, Any]) -> None:
        """Warns when a run continues with settings that change its curve."""
        try:
            before = json.loads((self.path / ARGUMENTS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        changed = [
            f"{key} ({before.get(key)!r} -> {value!r})"
            for key, value in arguments.items()
            if key not in _MAY_CHANGE and before.get(key) != value
        ]
        if changed:
            self.warnings.append(
                "this run continues with other settings than it began with, so its curve will not be the "
                "one of an uninterrupted run: " + ", ".join(changed)
            )


def open_run_directory(args: Arguments) -> RunDirectory:
    """Claims the output folder and decides where training starts.

    Raises:
        UserError: The folder belongs to something else, holds a finished run that would be
            overwritten, is in use, or the checkpoint asked for is not valid.
    """
    path = Path(args.training.output_dir).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file: choose a folder.")
    run = RunDirectory(path)
    if args.training.do_train:
        _check_contents(run, overwrite=args.training.overwrite_output_dir)
    _make_folder(path)
    run.take_lock()
    if args.training.do_train:
        _choose_start(run, args)
        write_json(path / ARGUMENTS_FILE, args.to_json())
    return run


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / LOCK_FILE).touch()
    except OSError as error:
        raise UserError(
            f"output_dir {path} cannot be written: {error.strerror}. Choose another folder."
        ) from None


def _check_contents(run: RunDirectory, *, overwrite: bool) -> None:
    if overwrite or not run.path.is_dir() or not any(run.path.iterdir()):
        return
    ours = (run.path / ARGUMENTS_FILE).is_file() or list_checkpoints(run.path)
    if not ours and any(p.name != LOCK_FILE for p in run.path.iterdir()):
        raise UserError(
            f"output_dir {run.path} is not empty and holds no run of this program: choose another folder, "
            "or add --overwrite_output_dir true to write into it."
        )
    if (run.path / FINISHED_FILE).is_file() and not list_checkpoints(run.path):
        raise UserError(
            f"output_dir {run.path} holds a finished run without checkpoints: choose another folder, "
            "or add --overwrite_output_dir true to replace it."
        )


def _choose_start(run: RunDirectory, args: Arguments) -> None:
    remove_leftovers(run.path)
    asked = args.training.resume_from_checkpoint
    if asked and str(asked).lower() not in ("true", "false"):
        fault = find_fault(Path(asked)) if step_of(Path(asked)) >= 0 else "its name is not checkpoint-<step>"
        if fault:
            raise UserError(f"resume_from_checkpoint {asked} cannot be used: {fault}.")
        run.resume = Path(asked)
    elif args.training.overwrite_output_dir:
        set_aside(run.path)
    else:
        run.resume = newest_valid_checkpoint(run.path, run.warnings.append)
        if run.resume is None and list_checkpoints(run.path):
            run.warnings.append("no valid checkpoint is left, training starts from the first step.")
    if run.resume is not None:
        run.note_changes(args.to_json())
