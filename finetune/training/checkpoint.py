"""Checkpoints that are either whole or absent.

A checkpoint is written under a temporary name, every file is flushed to the disk, a
manifest with the size and hash of each file is written last, and only then the folder
gets its name by one rename. Several processes write their files into the same folder; rank 0 makes it and names it,
when all have told that they are done. Whatever moment a process dies at, the folders that carry a
checkpoint's name are complete; should a file be altered afterwards, the manifest tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.files import sync_folder, write_json
from finetune.parallel.groups import ProcessGroups
from finetune.parallel.joint_steps import together

MANIFEST_NAME = "manifest.json"
CHECKPOINT_PREFIX = "checkpoint-"
TEMPORARY_PREFIX = "tmp-checkpoint-"
REPLACED_PREFIX = "replaced-checkpoint-"
_CHECKPOINT_NAME = re.compile(rf"{CHECKPOINT_PREFIX}(\d+)")
_CHUNK_BYTES = 1 << 22


def step_of(checkpoint: Path) -> int:
    """The optimizer step in the name of a checkpoint folder, -1 when there is none."""
    match = _CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders of a run, oldest step first, valid or not."""
    found = [path for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*") if step_of(path) >= 0]
    return sorted(found, key=step_of)


def write_checkpoint(
    output_dir: Path,
    step: int,
    write_files: Callable[[Path], None],
    groups: ProcessGroups | None = None,
) -> Path:
    """Writes checkpoint-<step> so that it appears complete or not at all.

    Args:
        output_dir: The folder of the run; with several hosts, on storage that they share.
        step: Finished optimizer steps.
        write_files: Receives an empty folder and fills it; each rank writes its own files.
        groups: All ranks call this; None for one process.

    Returns:
        The folder of the finished checkpoint. One of the same step is replaced.

    Raises:
        Exception: What `write_files` raised; on the other ranks a RuntimeError that names the rank. The
            unfinished folder is deleted.
    """
    groups = groups or ProcessGroups()
    final = Path(output_dir) / f"{CHECKPOINT_PREFIX}{step}"
    temporary = Path(output_dir) / f"{TEMPORARY_PREFIX}{step}"

    def clean_up() -> None:
        shutil.rmtree(temporary, ignore_errors=True)

    with together(groups):
        if groups.is_first:
            clean_up()
            temporary.mkdir(parents=True)
    with together(groups, clean_up):
        write_files(temporary)
    facts: dict[str, dict[str, Any]] = {}
    names = groups.world.gather_objects(_file_names(temporary) if groups.is_first else None)[0]
    with together(groups, clean_up):
        # Shared out over the ranks: hashing takes longer than writing.
        facts = {name: _facts(temporary / name) for name in names[groups.rank :: groups.world.size]}
    parts = groups.world.gather_objects(facts)
    with together(groups, clean_up):
        if groups.is_first:
            _write_manifest(temporary, step, {name: part[name] for part in parts for name in part})
            _give_name(temporary, final)
    return final


def _give_name(temporary: Path, final: Path) -> None:
    replaced = final.with_name(f"{REPLACED_PREFIX}{step_of(final)}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _hash_and_sync(path)}


def _write_manifest(folder: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
    write_json(folder / MANIFEST_NAME, {"step": step, "files": dict(sorted(files.items()))})
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync_folder(path)


def _hash_and_sync(path: Path) -> str:
    with open(path, "rb") as file:
        digest = _digest(file)
        os.fsync(file.fileno())
    return digest


def _digest(file) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def find_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None when its manifest holds for every file."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST_NAME} cannot be read ({error})"
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {facts['size']}"
        with open(path, "rb") as file:
            if _digest(file) != facts["sha256"]:
                return f"{name} was altered after it was written"
    return None


def newest_valid_checkpoint(output_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose manifest holds; each newer broken one is named in a warning."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        warn(f"{checkpoint} is not used: {fault}.")
    return None


def remove_leftovers(output_dir: Path) -> None:
    """Deletes what a killed run had begun to write and never finished."""
    for path in Path(output_dir).glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(output_dir: Path, *, beyond: int = -1) -> None:
    """Takes checkpoints out of sight of resume, without deleting them yet: `rotate` does, after a save.

    Args:
        output_dir: The folder of the run.
        beyond: Only those of later steps: another history follows from here.
    """
    for path in list_checkpoints(output_dir):
        if step_of(path) <= beyond:
            continue
        target = path.with_name(f"{REPLACED_PREFIX}{step_of(path)}")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(path, target)


def rotate(output_dir: Path, *, keep: int | None, best: Path | None, newest: Path) -> list[Path]:
    """Deletes the oldest checkpoints beyond `keep`, and those that were set aside.

    Args:
        output_dir: The folder of the run.
        keep: How many to keep; None or 0 keeps all.
        best: The best checkpoint so far, which always stays.
        newest: The one just written, which always stays; so `keep=1` keeps two when they differ.

    Returns:
        The folders that were deleted.
    """
    doomed = list(Path(output_dir).glob(f"{REPLACED_PREFIX}*"))
    checkpoints = list_checkpoints(output_dir)
    if keep is not None and keep > 0 and len(checkpoints) > keep:
        protected = {newest} | ({best} if best else set())
        spare = max(0, keep - len(protected))
        candidates = [path for path in checkpoints if path not in protected]
        doomed += candidates[: len(candidates) - spare]
    for path in doomed:
        # A folder that loses its manifest first can never be mistaken for a checkpoint half-way.
        (path / MANIFEST_NAME).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    return doomed
