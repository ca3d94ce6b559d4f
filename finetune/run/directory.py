"""The output folder of a run: who may write to it, what is in it, where to continue."""

from __future__ import annotations

import json
import shutil
import socket
import time
import uuid
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune.checkpoints.folder import (
    REPLACED_PREFIX,
    find_fault,
    list_checkpoints,
    list_foreign,
    newest_valid_checkpoint,
    remove_leftovers,
    set_aside,
    step_of,
)
from finetune.errors import UserError
from finetune.processes.network.secret import SECRET_PREFIX
from finetune.run.disk_space import TRIAL_FILE, try_writing
from finetune.run.template_day import choose_day
from finetune.settings.model import FROZEN_PARTS
from finetune.settings.registry import known_settings
from finetune.storage.files import read_json_if_present, read_json_object, read_json_or_empty, write_json
from finetune.storage.lock import take_lock

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups
    from finetune.settings.arguments import Arguments

_SHARED_FOLDER_SECONDS = 10.0

ARGUMENTS_FILE = "arguments.json"
ENGINES_KEY = "layout_engines"
FINISHED_FILE = "trainer_state.json"
LOCK_FILE = ".lock"
OVERWRITING_FILE = ".overwriting.json"
TRAINED_FILE = ".trained.json"
"""Stands beside final weights as long as something of the run's end is missing: results, curve, texts, upload."""
RESULTS_FILE = "all_results.json"
_OUTPUTS = ("model*.safetensors*", "peft_model*", "initial_factors*", "lora_config.json", "prefix_config.json",
            "adapter_facts.json", "generated_output.json", "other_parts*", "whole_config.json")  # fmt: skip


@dataclass
class RunDirectory:
    """An output folder that this process holds, and the checkpoint to continue from.

    Attributes:
        path: The folder.
        resume: The checkpoint that training continues from, or None for a fresh start.
        finished: Whether this very run is done already; there is nothing to do then.
        trained: Whether its final weights stand and only what follows the training is missing.
        replaces: Whether an earlier run in this folder is being replaced, on request.
        warnings: What the person should know before training starts.
        template_day: The day that the chat template is told, where it asks for the date: that on which the run began.
    """

    path: Path
    resume: Path | None = None
    finished: bool = False
    trained: bool = False
    replaces: bool = False
    warnings: list[str] = field(default_factory=list)
    template_day: str | None = None
    _lock: IO[str] | None = field(default=None, init=False)

    @property
    def resume_step(self) -> int | None:
        """Optimizer steps done where this process continues, None for a fresh start."""
        if self.trained:
            step = read_json_object(self.path / FINISHED_FILE, keys=("global_step",))["global_step"]
            if type(step) is not int:
                raise UserError(
                    f"{self.path / FINISHED_FILE} cannot be used (global_step is no number): copy it again"
                )
            return step
        return None if self.resume is None else step_of(self.resume)

    def decisions(self) -> dict[str, Any]:
        """All but the lock, for processes that follow."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._lock:
            self._lock.close()

    def take_lock(self) -> None:
        """Refuses a second run in the same folder while this one lives."""
        self._lock = take_lock(self.path / LOCK_FILE, f"output_dir {self.path}")

    def changes(self, arguments: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Settings that shape the curve and differ from those the run in this folder began with: (old, new)."""
        before = read_json_or_empty(self.path / ARGUMENTS_FILE)
        return {
            key: (before[key], value)
            for key, value in arguments.items()
            if key in before and before[key] != value and not known_settings()[key].may_change
        }

    def note_engines(self, engines: dict[str, str]) -> None:
        """Adds to the run's settings, where these were written, what drives each axis of its layout."""
        path = self.path / ARGUMENTS_FILE
        if settings := read_json_or_empty(path):
            write_json(path, settings | {ENGINES_KEY: engines})

    def settle(self) -> None:
        """Removes what a replaced run left, once the new run's final files stand."""
        if not self.replaces:
            return
        for path in [*self.path.glob(f"{REPLACED_PREFIX}*")]:
            shutil.rmtree(path, ignore_errors=True)

    def finish(self) -> None:
        """Marks the run as finished, once its last file stands."""
        self.settle()
        (self.path / OVERWRITING_FILE).unlink(missing_ok=True)
        (self.path / TRAINED_FILE).unlink(missing_ok=True)

    def remove_old_outputs(self, *, keep: set[str]) -> None:
        """Removes weights and texts of a replaced run that the new one has no files for."""
        if self.replaces:
            for path in [path for pattern in _OUTPUTS for path in self.path.glob(pattern)]:
                if path.name not in keep:
                    path.unlink()


def open_run_directory(args: Arguments, groups: ProcessGroups) -> RunDirectory:
    """Claims the output folder and decides where training starts.

    The first process does it; the others get its decisions.

    Raises:
        UserError: The folder belongs to something else, holds a finished run that would be
            overwritten, is in use, or the checkpoint asked for is not valid.
    """
    from finetune.processes.joint_steps import on_first

    opened: list[RunDirectory] = []

    def claim() -> dict[str, Any]:
        opened.append(_claim(args))
        return opened[0].decisions()

    decisions = on_first(groups, claim)
    if groups.world.size > 1:
        check_shared_folder(Path(decisions["path"]), groups)
    return opened[0] if opened else RunDirectory(**decisions)


def _claim(args: Arguments) -> RunDirectory:
    path = Path(args.training.output_dir).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir {path} is a file: choose a folder.")
    run = RunDirectory(path)
    if args.training.do_train:
        _check_contents(run, args)
    elif not _is_own_run(path) and (path / RESULTS_FILE).is_file():
        raise UserError(
            f"output_dir {path} holds {RESULTS_FILE} of another program, which this evaluation would overwrite: "
            "choose another folder."
        )
    _make_folder(path)
    run.take_lock()
    if not run.finished:
        try_writing(path)
    if run.trained:
        remove_leftovers(path)
        run.replaces = (path / OVERWRITING_FILE).is_file()
    elif args.training.do_train and not run.finished:
        _choose_start(run, args)
        (path / FINISHED_FILE).unlink(missing_ok=True)
        (path / TRAINED_FILE).unlink(missing_ok=True)
        write_json(path / ARGUMENTS_FILE, args.to_json())
    choose_day(run, args)
    return run


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / LOCK_FILE).touch()
    except OSError as error:
        raise UserError(
            f"output_dir {path} cannot be written: {error.strerror}. Choose another folder."
        ) from None


def _check_contents(run: RunDirectory, args: Arguments) -> None:
    """Refuses to write over what belongs to others, or over a finished run with other settings."""
    if not run.path.is_dir():
        return
    lacks_end = (run.path / FINISHED_FILE).is_file() and (run.path / TRAINED_FILE).is_file()
    ours = _is_own_run(run.path)
    # Not even where overwriting is asked for: it may be the only copy.
    if not ours and (foreign := list_foreign(run.path)):
        raise UserError(
            f"output_dir {run.path} holds {foreign[-1].name}, which another program wrote: choose another output_dir. "
            f"To start from its weights, set model_name_or_path (or lora_path, prefix_path) to {foreign[-1]}."
        )
    if args.training.overwrite_output_dir:
        run.trained = lacks_end and read_json_or_empty(run.path / OVERWRITING_FILE) == args.to_json()
        return
    if not ours and not all(_is_beginning(path.name) for path in run.path.iterdir()):
        raise UserError(
            f"output_dir {run.path} is not empty and holds no run of this program: choose another folder, "
            "or add --overwrite_output_dir true to write into it."
        )
    is_finished = (run.path / FINISHED_FILE).is_file() and "train_steps" in read_json_or_empty(
        run.path / RESULTS_FILE
    )
    if (is_finished or lacks_end) and not args.training.resume_from_checkpoint:
        read_json_if_present(run.path / ARGUMENTS_FILE)  # a damaged one does not tell whether it is this run
        _check_finished(run, run.changes(args.to_json()), lacks_end=lacks_end)


def _is_beginning(name: str) -> bool:
    """Whether a run that was killed at its very start may have left a file of that name."""
    return name in (LOCK_FILE, TRIAL_FILE, f".{ARGUMENTS_FILE}.tmp") or name.startswith(SECRET_PREFIX)


def _is_own_run(path: Path) -> bool:
    return (path / ARGUMENTS_FILE).is_file() or bool(list_checkpoints(path))


def _check_finished(run: RunDirectory, changes: dict[str, tuple[Any, Any]], *, lacks_end: bool) -> None:
    others = [name for name in changes if not known_settings()[name].may_grow]
    is_longer = not others and all(_are_numbers(*pair) for pair in changes.values())
    is_longer = is_longer and any(new > old for old, new in changes.values())
    if not changes:
        run.finished, run.trained = not lacks_end, lacks_end
    elif not is_longer:
        raise UserError(
            f"output_dir {run.path} holds a finished run with other settings ({_describe(changes)}): choose another "
            "folder, or add --overwrite_output_dir true to replace it."
        )
    elif not list_checkpoints(run.path):
        raise UserError(
            f"output_dir {run.path} holds a finished run without checkpoints, so it cannot be trained further: "
            "choose another folder, or add --overwrite_output_dir true to replace it."
        )


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _choose_start(run: RunDirectory, args: Arguments) -> None:
    remove_leftovers(run.path)
    arguments = args.to_json()
    asked = args.training.resume_from_checkpoint
    marker = run.path / OVERWRITING_FILE
    if asked:
        run.resume = Path(asked)
        fault = find_fault(run.resume) if step_of(run.resume) >= 0 else "its name is not checkpoint-<step>"
        if fault:
            raise UserError(f"resume_from_checkpoint {asked} cannot be used: {fault}.")
    elif args.training.overwrite_output_dir and read_json_or_empty(marker) != arguments:
        # Once begun, the same command continues the new run instead of replacing it again.
        set_aside(run.path)
        write_json(marker, arguments)
    else:
        run.resume = newest_valid_checkpoint(run.path, run.warnings.append)
        if run.resume is None and run.warnings:
            run.warnings.append("no valid checkpoint is left, training starts from the first step.")
    run.replaces = marker.is_file()
    if run.resume is not None:
        _check_precision(run.resume, args)
        if not asked:
            _check_trained_parts(run, arguments)
        set_aside(run.path, beyond=step_of(run.resume))
        try:
            read_json_if_present(run.path / ARGUMENTS_FILE)
        except UserError as error:
            run.warnings.append(f"whether this run continues with other settings is not known: {error}")
        if changes := run.changes(arguments):
            run.warnings.append(
                "this run continues with other settings than it began with, so its curve will not be the "
                f"one of an uninterrupted run: {_describe(changes)}"
            )


def _check_trained_parts(run: RunDirectory, arguments: dict[str, Any]) -> None:
    """Refuses to continue with other parameters than the run began with: there is no optimizer state for them."""
    before = read_json_or_empty(run.path / ARGUMENTS_FILE)
    for name in FROZEN_PARTS if before else ():
        old, new = before.get(name), arguments.get(name)
        if (old or new) and old != new:
            raise UserError(
                f"output_dir {run.path} holds a run with {name} {json.dumps(old)}, and this one has {json.dumps(new)}: "
                "continue with the same parameters, choose another folder, or add --overwrite_output_dir true"
            )


def _check_precision(checkpoint: Path, args: Arguments) -> None:
    """Refuses half-precision weights where a checkpoint holds no float32 ones to go on from."""
    from finetune.checkpoints.optimizer_state import NO_MASTERS, holds_master_weights
    from finetune.run.model import parameter_dtype

    types = parameter_dtype(args), args.model.lora_dtype  # beside float32 matrices, the reader knows
    if "float32" not in types and holds_master_weights(checkpoint) is False:
        raise UserError(f"{checkpoint} {NO_MASTERS}")


def _describe(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} ({old!r} -> {new!r})" for name, (old, new) in changes.items())


def check_shared_folder(
    folder: Path, groups: ProcessGroups, *, seconds: float = _SHARED_FOLDER_SECONDS
) -> None:
    """Makes sure that all hosts of a run write into the same folder; all ranks must call it.

    Args:
        folder: The run's output folder; made where it is missing.
        groups: All ranks.
        seconds: How long a file of rank 0 may take to be seen elsewhere.

    Raises:
        UserError: Hosts whose folder is another one; on every rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if groups.world.size == 1:
        return
    token = folder / f".shared-{groups.world.gather_objects(uuid.uuid4().hex)[0]}"
    if groups.is_first:
        token.touch()
    groups.world.barrier()
    deadline = time.monotonic() + seconds
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    answers = groups.world.gather_objects((socket.gethostname(), groups.rank, seen))
    if groups.is_first:
        token.unlink(missing_ok=True)
    blind = sorted({host for host, _, saw in answers if not saw})
    if blind:
        ranks = ", ".join(str(rank) for _, rank, saw in answers if not saw)
        raise UserError(
            f"output_dir {folder} is not the same folder on all hosts: {', '.join(blind)} (rank {ranks}) does not see "
            f"what {answers[0][0]} writes there within {seconds:g} s. Put output_dir on storage that all hosts mount"
        )
