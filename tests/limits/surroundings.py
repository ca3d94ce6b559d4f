"""Starts a command where the disk is small, nothing is allowed that its files' modes forbid, or a limit is low.

python -m tests.limits.surroundings [--small FOLDER KIB] [--without_rights] [--limit AS|FSIZE BYTES] -- COMMAND ...
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
from pathlib import Path

from tests.rights import drop_rights

_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_PR_SET_SECUREBITS = 28
_SECURE_NO_ROOT = 0b11  # programs that root starts get no rights for it; locked
CANNOT = 77
"""Exit code where the system does not let such surroundings be made."""


def main() -> None:
    """Makes the surroundings and becomes the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", nargs=2, action="append", default=[])
    parser.add_argument("--without_rights", action="store_true")
    parser.add_argument("--limit", nargs=2, action="append", default=[])
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    try:
        for folder, kibibytes in options.small:
            mount_small(Path(folder), int(kibibytes))
        if options.without_rights:
            keep_rights_dropped()
            drop_rights()
    except OSError as error:
        print(error)
        raise SystemExit(CANNOT) from None
    for name, number in options.limit:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (int(number), int(number)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.execv(options.command[0], options.command)


def mount_small(folder: Path, kibibytes: int) -> None:
    """Puts a small empty disk on a folder, for this process and those that it becomes or starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir(exist_ok=True)
    size = f"size={kibibytes}k".encode()
    _check(libc.unshare(_CLONE_NEWNS))
    _check(libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))
    _check(libc.mount(b"none", os.fsencode(folder.resolve()), b"tmpfs", ctypes.c_ulong(0), size))


def keep_rights_dropped() -> None:
    """Programs that are started from here on get no rights back for being root's."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        _check(libc.prctl(_PR_SET_SECUREBITS, ctypes.c_ulong(_SECURE_NO_ROOT), 0, 0, 0))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    main()
