"""Files that are seen whole or not at all, whatever moment a process dies at; and JSON files that may hold anything."""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk that is full, and of limits that act like one."""
MAX_JSON_BYTES = 200_000_000
"""The longest JSON file that is read; the tokenizers and weight indexes of today have up to 40,000,000."""
_COPY_AGAIN = "copy it again"

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


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


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A file to read, from its first byte on.

    Raises:
        UserError: It is missing, may not be read, or is no file but a folder, a pipe or a device, which could keep
            the program waiting.
    """
    try:
        # Without O_NONBLOCK, to open a pipe is to wait for who writes into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        kind = os.fstat(descriptor).st_mode
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {_remedy(error)}") from None
    except ValueError as error:  # a null character in the name
        raise UserError(f"{os.fspath(path)!r} cannot be read ({error}): correct the path") from None
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(kind) else "a pipe or a device"
        raise UserError(f"{path} cannot be read (it is {what}, not a file): put the file there")
    return os.fdopen(descriptor, "rb")


def is_present(path: str | os.PathLike[str]) -> bool:
    """Whether there is something of that name, be it no file or not to be read, which opening it tells."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _remedy(error: OSError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "copy it there"
    return "allow it to be read" if isinstance(error, PermissionError) else _COPY_AGAIN


def read_text(
    path: str | os.PathLike[str], *, remedy: str = _COPY_AGAIN, max_bytes: int = MAX_JSON_BYTES
) -> str:
    """A UTF-8 text file; a byte order mark at its start is left out.

    Args:
        path: The file.
        remedy: What to do about a file that holds something else.
        max_bytes: The longest file that is read.

    Raises:
        UserError: It cannot be read, is too long, or is no UTF-8 text.
    """
    try:
        with open_file(path) as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise UserError(f"{path} cannot be read (it has more than {max_bytes} bytes): {remedy}")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no UTF-8 text (byte {error.object[error.start]:#04x} at {error.start}): {remedy}"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {_remedy(error)}") from None


def read_json(
    path: str | os.PathLike[str], *, remedy: str = _COPY_AGAIN, max_bytes: int = MAX_JSON_BYTES
) -> Any:
    """Any value from a JSON file.

    Args:
        path: The file.
        remedy: What to do about a file that holds something else.
        max_bytes: The longest file that is read.

    Raises:
        UserError: It cannot be read, or is no valid JSON.
    """
    text = read_text(path, remedy=remedy, max_bytes=max_bytes)
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):  # pairs are characters, halves pass the parser and fail somewhere else
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise UserError(f"{path} is no valid JSON ({half} is half of a character): {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}): {remedy}") from None
    except RecursionError:
        raise UserError(f"{path} is no valid JSON (it is nested too deep): {remedy}") from None


def read_json_object(
    path: str | os.PathLike[str],
    *,
    keys: Sequence[str] = (),
    remedy: str = _COPY_AGAIN,
    max_bytes: int = MAX_JSON_BYTES,
) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: The file.
        keys: What it must have.
        remedy: What to do about a file that holds something else.
        max_bytes: The longest file that is read.

    Raises:
        UserError: It is missing, cannot be read, or holds something else.
    """
    content = read_json(path, remedy=remedy, max_bytes=max_bytes)
    if not isinstance(content, dict):
        found = _JSON_NAMES[type(content)]
        raise UserError(f"{path} holds no JSON object but {found}: {remedy}")
    if missing := [key for key in keys if key not in content]:
        raise UserError(f"{path} has no {', '.join(missing)}: {remedy}")
    return content


_JSON_NAMES = {
    list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false", type(None): "null",
}  # fmt: skip


def read_json_if_present(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file, an empty one where there is nothing of that name.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    return read_json_object(path) if is_present(path) else {}


def read_json_or_empty(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file; an empty one where the file is missing or cannot be read."""
    try:
        return read_json_object(path)
    except UserError:
        return {}


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
