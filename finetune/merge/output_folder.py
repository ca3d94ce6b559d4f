"""A folder that carries its name only when everything in it is complete and on the disk.

It is filled under a hidden name beside it and renamed at the end. A merge that was killed leaves the hidden folder,
which the next merge to the same place removes.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import UserError
from finetune.files import read_json_or_empty, sync_folder, write_json

RECORD_NAME = "merge.json"
"""What was merged; its presence marks a folder as the result of a merge."""


def check_output(folder: Path, source: Path, *, overwrite: bool) -> None:
    """Says before any work whether the result may be put there.

    An earlier result that a merge was replacing when it was killed gets its name back first.

    Raises:
        UserError: It is the source or lies inside it, is no folder, or holds something else already.
    """
    if folder.resolve() == source.resolve():
        raise UserError(f"--output_dir {folder} is the checkpoint itself: give another folder")
    _restore_replaced(folder.absolute())
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: give a folder that does not exist yet")
    if not any(folder.iterdir()):
        return
    if RECORD_NAME not in os.listdir(folder):
        raise UserError(
            f"--output_dir {folder} is not empty and not the result of a merge: give a folder that does not exist yet"
        )
    if not overwrite:
        merged = read_json_or_empty(folder / RECORD_NAME).get("source", "another checkpoint")
        raise UserError(
            f"--output_dir {folder} holds what was merged from {merged}: add --overwrite true to replace it, or "
            "give another folder"
        )


@contextmanager
def output_folder(folder: Path, record: dict[str, object]) -> Iterator[Path]:
    """Gives a folder to fill; on success it becomes `folder`, on failure it is removed.

    Args:
        folder: Where the result is to be.
        record: What to note in the result beside its files and their sizes.
    """
    target = folder.absolute()
    hidden = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder} cannot be made ({error.strerror}): give another folder"
        ) from error
    try:
        yield hidden
        sizes = {path.name: path.stat().st_size for path in sorted(hidden.iterdir())}
        for name in sizes:
            _sync_file(hidden / name)
        write_json(hidden / RECORD_NAME, record | {"files": sizes})
        sync_folder(hidden)
        _take_place(hidden, target)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{target.parent} has no room for the result ({error.strerror}): make room there"
        ) from error
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _take_place(hidden: Path, target: Path) -> None:
    replaced = _replaced_name(target)
    _restore_replaced(target)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(hidden, target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _restore_replaced(target: Path) -> None:
    """Mends what a crash between the two renames of `_take_place` leaves: the old result under its hidden name."""
    replaced = _replaced_name(target)
    if replaced.is_dir() and not os.path.lexists(target):
        os.rename(replaced, target)
        sync_folder(target.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
