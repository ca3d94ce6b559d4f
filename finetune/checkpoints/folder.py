"""Checkpoints that are either whole or absent.

A checkpoint is written under a temporary name, every file is flushed to the disk, a
manifest with the size and hash of each file is written last, and only then the folder
gets its name by one rename. Several processes write their files into the same folder; rank 0 makes it and names it,
when all have told that they are done. Whatever moment a process dies at, the folders that carry a
checkpoint's name are complete; should a file be altered afterwards, the manifest tells.

A folder without a valid manifest of ours was written by somebody else, or cannot be told from one that was, whatever
its name: it is never continued from, rotated away or overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from finetune.errors import UserError
from finetune.processes.groups import ProcessGroups
from finetune.processes.joint_steps import fail_on_all_ranks
from finetune.storage.files import is_present, read_json_object, sync_folder, write_json

MANIFEST_NAME = "manifest.json"
CHECKPOINT_PREFIX = "checkpoint-"
TEMPORARY_PREFIX = "tmp-checkpoint-"
FINAL_PREFIX = "tmp-final-"
"""Begins the name of a folder with final weights that do not stand in the output folder yet."""
REPLACED_PREFIX = "replaced-checkpoint-"
KEPT_PREFIX = "kept-checkpoint-"
"""Begins the name of a folder that stood in a checkpoint's place and is not ours to delete."""
_CHECKPOINT_NAME = re.compile(rf"{CHECKPOINT_PREFIX}(\d+)")
_CHUNK_BYTES = 1 << 22
_WEIGHTS_ONLY = "weights_only"
_MAX_MANIFEST_BYTES = 1 << 26
_SHA256 = re.compile(r"[0-9a-f]{64}")


def step_of(checkpoint: Path) -> int:
    """The optimizer step in the name of a checkpoint folder, -1 when there is none."""
    match = _CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders that this program wrote, oldest step first, whether or not their files are damaged."""
    return [path for path in _named_like_checkpoints(output_dir) if _is_own(path)]


def list_foreign(output_dir: Path) -> list[Path]:
    """Folders named like checkpoints that have no valid manifest: another program wrote them."""
    return [path for path in _named_like_checkpoints(output_dir) if not _is_own(path)]


def _named_like_checkpoints(output_dir: Path) -> list[Path]:
    found = [path for path in Path(output_dir).glob(f"{CHECKPOINT_PREFIX}*") if step_of(path) >= 0]
    return sorted(found, key=step_of)


def _is_own(checkpoint: Path) -> bool:
    """Whether this program wrote it: other programs have files called manifest.json, too."""
    try:
        _read_manifest(checkpoint)
    except (UserError, ValueError):
        return False
    return True


def _remove(folder: Path) -> None:
    """Deletes a folder as far as that is allowed; of a link the link only, as its folder lies somewhere else."""
    with contextlib.suppress(OSError):
        _remove_whole(folder)
    if not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)


def _remove_whole(folder: Path) -> None:
    """Deletes a folder, or of a link the link only.

    Raises:
        OSError: It is not allowed; some of it may be gone.
    """
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    elif folder.exists():
        shutil.rmtree(folder)


def write_checkpoint(
    output_dir: Path,
    step: int,
    write_files: Callable[[Path], None],
    groups: ProcessGroups | None = None,
    *,
    has_moments: bool = True,
) -> Path:
    """Writes checkpoint-<step> so that it appears complete or not at all.

    Args:
        output_dir: The folder of the run; with several hosts, on storage that they share.
        step: Finished optimizer steps.
        write_files: Receives an empty folder and fills it; each rank writes its own files.
        groups: All ranks call this; None for one process.
        has_moments: Whether the files hold what the optimizer has gathered; the manifest says where they do not.

    Returns:
        The folder of the finished checkpoint. One of the same step is replaced.

    Raises:
        Exception: What `write_files` raised; on the other ranks RankFailed, which names the rank. The
            unfinished folder is deleted.
    """
    groups = groups or ProcessGroups()
    final = Path(output_dir) / f"{CHECKPOINT_PREFIX}{step}"
    temporary = Path(output_dir) / f"{TEMPORARY_PREFIX}{step}"

    def clean_up() -> None:
        _remove(temporary)

    with fail_on_all_ranks(groups):
        if groups.is_first:
            clean_up()
            temporary.mkdir(parents=True)
    with fail_on_all_ranks(groups, clean_up):
        write_files(temporary)
    facts: dict[str, dict[str, Any]] = {}
    names = groups.world.gather_objects(_file_names(temporary) if groups.is_first else None)[0]
    with fail_on_all_ranks(groups, clean_up):
        # Shared out over the ranks: hashing takes longer than writing.
        facts = {name: _facts(temporary / name) for name in names[groups.rank :: groups.world.size]}
    parts = groups.world.gather_objects(facts)
    with fail_on_all_ranks(groups, clean_up):
        if groups.is_first:
            files = {name: part[name] for part in parts for name in part}
            _write_manifest(temporary, step, files, has_moments=has_moments)
            _give_name(temporary, final)
    return final


def _give_name(temporary: Path, final: Path) -> None:
    replaced = final.with_name(f"{REPLACED_PREFIX}{step_of(final)}")
    if final.exists() and not _is_own(final):
        os.rename(final, _free_name(final))
    elif final.exists():
        _remove(replaced)
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(final.parent)
    _remove(replaced)


def _free_name(checkpoint: Path) -> Path:
    """A name for a folder that is kept although a checkpoint takes its place."""
    names = (
        checkpoint.with_name(f"{KEPT_PREFIX}{step_of(checkpoint)}-{number}") for number in itertools.count(1)
    )
    return next(path for path in names if not path.exists())


def _file_names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _hash_and_sync(path)}


def _write_manifest(folder: Path, step: int, files: dict[str, dict[str, Any]], *, has_moments: bool) -> None:
    facts = {"step": step} | ({} if has_moments else {_WEIGHTS_ONLY: True})
    write_json(folder / MANIFEST_NAME, facts | {"files": dict(sorted(files.items()))})
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync_folder(path)


def _hash_and_sync(path: Path) -> str:
    with open(path, "rb") as file:
        digest = _digest(file)
        os.fsync(file.fileno())
    return digest


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def find_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None when its manifest holds for every file."""
    path = checkpoint / MANIFEST_NAME
    if not is_present(path):
        return f"it has no {MANIFEST_NAME}"
    try:
        files = _read_manifest(checkpoint)
    except (UserError, ValueError) as error:
        return f"its {MANIFEST_NAME} cannot be read ({error})"
    try:
        faults = (_find_file_fault(checkpoint, name, facts) for name, facts in files.items())
        return next((fault for fault in faults if fault), None)
    except OSError as error:
        return f"it cannot be read ({error})"


def lacks_moments(checkpoint: Path) -> bool:
    """Whether a checkpoint was written without what the optimizer had gathered, by choice.

    Raises:
        UserError: Its manifest cannot be read.
    """
    manifest = read_json_object(checkpoint / MANIFEST_NAME, max_bytes=_MAX_MANIFEST_BYTES)
    return manifest.get(_WEIGHTS_ONLY) is True


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Size and hash of each file.

    Raises:
        UserError: The manifest cannot be read.
        ValueError: This program has not written it for a folder of that name.
    """
    manifest = read_json_object(checkpoint / MANIFEST_NAME, max_bytes=_MAX_MANIFEST_BYTES)
    _check_manifest(manifest, checkpoint)
    files: dict[str, Any] = manifest["files"]
    return files


def _check_manifest(manifest: Any, checkpoint: Path) -> None:
    if not isinstance(manifest.get("files"), dict) or not manifest["files"]:
        raise ValueError("it lists no files")
    if step_of(checkpoint) >= 0 and manifest.get("step") != step_of(checkpoint):
        raise ValueError(f"it belongs to step {manifest.get('step')!r}")
    for name, facts in manifest["files"].items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise ValueError(f"{name!r} is no file of the folder")
        is_complete = (
            isinstance(facts, dict)
            and type(facts.get("size")) is int
            and isinstance(facts.get("sha256"), str)
            and _SHA256.fullmatch(facts["sha256"])
        )
        if not is_complete:
            raise ValueError(f"it has no size and hash of {name}")


def _find_file_fault(checkpoint: Path, name: str, facts: Mapping[str, Any]) -> str | None:
    path = checkpoint / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != facts["size"]:
        return f"{name} has {path.stat().st_size} bytes instead of {facts['size']}"
    with open(path, "rb") as file:
        return None if _digest(file) == facts["sha256"] else f"{name} was altered after it was written"


def newest_valid_checkpoint(output_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose manifest holds; each newer one that cannot be used is named in a warning."""
    for checkpoint in reversed(_named_like_checkpoints(output_dir)):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint
        warn(f"{checkpoint} is not used: {fault}.")
    return None


def remove_leftovers(output_dir: Path) -> None:
    """Deletes what a killed run had begun to write, or to delete, and never finished."""
    for prefix in (TEMPORARY_PREFIX, FINAL_PREFIX):
        for path in Path(output_dir).glob(f"{prefix}*"):
            _remove(path)
    for path in Path(output_dir).glob(".*.tmp"):  # of `write_atomically`
        if path.is_file():
            path.unlink()
    for path in Path(output_dir).glob(f"{REPLACED_PREFIX}*"):
        if not is_present(path / MANIFEST_NAME):  # `rotate` takes the manifest first
            _remove(path)


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
        _remove(target)
        os.rename(path, target)


def rotate(output_dir: Path, *, keep: int | None, best: Path | None, newest: Path) -> dict[Path, OSError]:
    """Deletes the oldest checkpoints beyond `keep`, and those that were set aside.

    Args:
        output_dir: The folder of the run.
        keep: How many to keep; None or 0 keeps all.
        best: The best checkpoint so far, which always stays.
        newest: The one just written, which always stays; so `keep=1` keeps two when they differ.

    Returns:
        What could not be deleted, such as a folder of another user, and why: it stays, and the training goes on.
    """
    failed: dict[Path, OSError] = {}
    doomed = list(Path(output_dir).glob(f"{REPLACED_PREFIX}*"))
    checkpoints = list_checkpoints(output_dir)
    if keep is not None and keep > 0 and len(checkpoints) > keep:
        protected = {newest} | ({best} if best else set())
        spare = max(0, keep - len(protected))
        candidates = [path for path in checkpoints if path not in protected]
        doomed += candidates[: len(candidates) - spare]
    for path in doomed:
        try:
            _delete(path)
        except OSError as error:
            renamed = path.with_name(f"{REPLACED_PREFIX}{step_of(path)}")
            failed[path if path.exists() else renamed] = error
    return failed


def _delete(checkpoint: Path) -> None:
    """Deletes a checkpoint; killed half-way, it leaves a folder that nobody takes for one."""
    if step_of(checkpoint) >= 0:
        target = checkpoint.with_name(f"{REPLACED_PREFIX}{step_of(checkpoint)}")
        _remove(target)
        os.rename(checkpoint, target)
        checkpoint = target
    if not checkpoint.is_symlink():
        (checkpoint / MANIFEST_NAME).unlink(missing_ok=True)
    _remove_whole(checkpoint)
