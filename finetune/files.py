"""Files that are seen whole or not at all, whatever moment a process dies at."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk that is full, and of limits that act like one."""


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a whole file so that a reader, or a kill at any moment, sees the old or the new one.

    One process at a time may write a path: what a killed one left under the temporary name is
    overwritten by the next.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON, Chinese as it is, as a whole."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    write_atomically(path, (text + "\n").encode())


def read_json_or_empty(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file; an empty one where the file is missing or cannot be read."""
    try:
        return read_json_object(path)
    except UserError:
        return {}


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: It is missing, cannot be read, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no valid JSON ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: copy it again")
    return content


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def fill_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill that carries its name only when everything in it is complete and on the disk.

    It is filled under a hidden name beside it and renamed at the end, in place of an earlier one. A process that was
    killed leaves the hidden folder, which the next one to the same place removes; on failure it is removed at once.

    Args:
        folder: The name at the end.
    """
    target = folder.absolute()
    hidden = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.mkdir(parents=True)
        yield hidden
        for path in hidden.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(hidden)
        _take_place(hidden, target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _take_place(hidden: Path, target: Path) -> None:
    restore_replaced(target)
    replaced = _replaced_name(target)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(hidden, target)
    sync_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Mends what a crash between the two renames of `fill_folder` leaves: the old folder under a hidden name."""
    replaced = _replaced_name(folder.absolute())
    if replaced.is_dir() and not os.path.lexists(folder):
        os.rename(replaced, folder)
        sync_folder(folder.absolute().parent)


def _replaced_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")
