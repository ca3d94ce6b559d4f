"""Whether an error comes from a disk or a limit of the system, and what to say of it."""

from __future__ import annotations

import errno
import os
import re

_OF_LIBRARY = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust (tokenizers, safetensors) end the text of what the system said."""
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room within your quota there",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or use a file system that takes larger files",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: "allow it to be used",
    errno.EPERM: "allow it to be used",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, the system has too many files open",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ESTALE: "mount that storage again",
    errno.ENOMEM: "free some memory",
}


def describe_disk_failure(error: BaseException | None) -> str | None:
    """What the system said, of which file, and what to do; None where an error has another cause.

    Args:
        error: Whatever was raised; what it was raised from counts, too.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REMEDIES:
            said = f"{error.strerror or os.strerror(error.errno)}: "
            name = error.filename if isinstance(error.filename, str) else ""
            return f"{said}{name + ': ' if name else ''}{_REMEDIES[error.errno]}"
        if found := _OF_LIBRARY.search(str(error)):
            number = int(found[1])
            if number in _REMEDIES:
                return f"{os.strerror(number)}: {_REMEDIES[number]}"
        error = error.__cause__
    return None
