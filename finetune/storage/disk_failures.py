"""Whether an error comes from a disk or a limit of the system, and what to say of it."""

from __future__ import annotations

import errno
import os
import re

from finetune.errors import find_remedy

_OF_LIBRARY = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust (tokenizers, safetensors) end the text of what the system said."""
_NUMBERS = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENAMETOOLONG,
        errno.ESTALE,
        errno.ENOMEM,
    )
)
"""What a disk or a limit of the system is to blame for."""


def describe_disk_failure(error: BaseException | None) -> str | None:
    """What the system said, of which file, and what to do; None where an error has another cause.

    Args:
        error: Whatever was raised; what it was raised from counts, too.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            said = f"{error.strerror or os.strerror(error.errno)}: "
            name = error.filename if isinstance(error.filename, str) else ""
            return f"{said}{name + ': ' if name else ''}{find_remedy(error.errno)}"
        if found := _OF_LIBRARY.search(str(error)):
            number = int(found[1])
            if number in _NUMBERS:
                return f"{os.strerror(number)}: {find_remedy(number)}"
        error = error.__cause__
    return None
