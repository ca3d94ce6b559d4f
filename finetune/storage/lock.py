"""One process at a time in a place on the disk, and who it is.

The kernel's lock on an open file ends with its process, however that ends, so a file that a dead process left blocks
nobody. What the file holds is only for people: the process, its machine and since when.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from finetune.errors import UserError
from finetune.storage.files import read_json_or_empty

_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


def take_lock(path: Path, what: str) -> IO[str]:
    """Takes a lock, which lasts until the file that this returns is closed.

    Args:
        path: The lock's file; made where it is missing.
        what: What nobody else may write, for the message: "output_dir checkpoints/lora".

    Raises:
        UserError: A living process has it, or it is a pipe or a device.
        OSError: The file cannot be made.
    """
    while True:
        file = _open_lock(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"{what} is in use by another running process{_describe_holder(path)}: wait for it, or choose "
                "another place"
            ) from None
        except OSError:  # a file system without locks: nobody can be kept out
            pass
        if _is_still(path, file):
            _note_holder(file)
            return file
        file.close()  # who held it removed the file between the two calls


@contextlib.contextmanager
def hold_output(output: Path, what: str) -> Iterator[None]:
    """Keeps other processes from an output while the block runs; the lock is a hidden file beside it.

    Args:
        output: A file or folder that is to be written.
        what: For the message, as in `take_lock`.

    Raises:
        UserError: A living process writes there.
        OSError: The lock cannot be made.
    """
    path = _lock_of(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = take_lock(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that nobody holds a file without a name
        file.close()


def remove_dead_lock(output: Path) -> None:
    """Removes the lock of a process that was killed when its output stood already."""
    if _lock_of(output).exists():
        with contextlib.suppress(UserError, OSError), hold_output(output, str(output)):
            pass


def _open_lock(path: Path) -> IO[str]:
    # Without O_NONBLOCK, to open a pipe is to wait for who reads from it.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    is_file = path.is_file() or not path.exists() or path.is_dir()  # of a folder the system says what it is
    if not is_file:
        raise UserError(f"{path} is a pipe or a device, not a file: remove it")
    return os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8")


def _lock_of(output: Path) -> Path:
    target = output.absolute()
    return target.with_name(f".{target.name}.lock")


def _is_still(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _note_holder(file: IO[str]) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime(_TIME_FORMAT)}
    with contextlib.suppress(OSError):  # a full disk has room for the lock all the same
        file.truncate(0)
        file.write(json.dumps(holder) + "\n")
        file.flush()


def _describe_holder(path: Path) -> str:
    holder = read_json_or_empty(path)
    pid, host, since = (holder.get(name) for name in ("pid", "host", "since"))
    if not (isinstance(pid, int) and isinstance(host, str) and isinstance(since, str)):
        return ""
    return f" (process {pid} on {host}, since {since})"
