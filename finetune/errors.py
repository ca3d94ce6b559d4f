"""Exceptions whose message is for the user, and what others say, in words for the user: no traceback for either."""

import errno
import json
import re
import struct
from collections.abc import Sequence

EXIT_FAILED = 1

EXIT_USER_ERROR = 2


def list_some(items: Sequence[str], most: int, *, separator: str = "; ") -> str:
    """The first `most` items and how many more there are, for a message: "a; b; and 3 more", "a, b and 3 more"."""
    listed = separator.join(items[:most])
    if len(items) <= most:
        return listed
    return f"{listed}{'' if separator == ', ' else separator.rstrip()} and {len(items) - most} more"


class UserError(Exception):
    """Arguments, data or files that cannot be used as given.

    Args:
        faults: One message or several; each names the value that was given, what is
            allowed, and what to do. All faults that can be found at once are reported
            at once.
    """

    def __init__(self, faults: str | Sequence[str]):
        given = (faults,) if isinstance(faults, str) else faults
        self.faults: tuple[str, ...] = tuple(map(hide_credentials, given))
        super().__init__("\n".join(self.faults))


def hide_credentials(text: str) -> str:
    """A text without the passwords and tokens of the addresses in it."""
    return _IN_QUERY.sub(r"\1***", _BEFORE_HOST.sub("://***@", text))


def holds_credentials(address: str) -> bool:
    """Whether an address names a password or a token."""
    return hide_credentials(address) != address


_BEFORE_HOST = re.compile(r"://[^/@\s]+@")
_IN_QUERY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|password|passwd)=)[^&\s\"']+", re.IGNORECASE)


class RunError(Exception):
    """A run that cannot go on, for a reason that its arguments do not show; ends a command with exit code 1.

    Args:
        message: What happened, what is still good, and what to do.
    """


class Interrupted(BaseException):
    """A termination signal arrived; what the message names was saved before.

    No Exception, so that a library which catches these cannot swallow it.
    """


_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, correct it",
    errno.EISDIR: "give a file, not a folder",
    errno.EACCES: "allow this user to use it, or choose another place",
    errno.EPERM: "allow this user to use it, or choose another place",
    errno.EROFS: "choose a place that may be written to",
    errno.ENOSPC: "make room on that disk, or choose another one",
    errno.EDQUOT: "make room within the quota, or choose another disk",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another disk",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its symbolic links lead in a circle, correct them",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, the machine has too many files open",
    errno.ENOMEM: "free memory, or take less at once",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or close other programs",
    errno.EIO: "check the disk and its connection",
    errno.ESTALE: "check the disk and its connection",
    errno.EPIPE: "the program that read the output has ended",
}
"""What to do about an error number of the operating system."""
_OTHER_REMEDY = "check the file and the disk it lies on"
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM)
"""What only a path can be to blame for, or who was allowed to use it."""


def describe_outside_error(error: BaseException) -> tuple[str, int] | None:
    """What the operating system, the memory or a parser says, as a line with the remedy, and the exit code.

    It is the last resort: whoever reads a file knows more about it, and raises a `UserError`.

    Args:
        error: Any exception.

    Returns:
        None where the program itself may be at fault.
    """
    if isinstance(error, OSError):
        return _describe_os_error(error)
    if isinstance(error, MemoryError):
        said = f" ({error})" if str(error) else ""
        return (
            f"not enough memory{said}: free memory, or take less at once, such as a smaller batch",
            EXIT_FAILED,
        )
    if isinstance(error, UnicodeEncodeError):
        code = ord(error.object[error.start])
        return (
            f"a text holds \\u{code:04x}, which {error.encoding} cannot write: remove that character, or set "
            "PYTHONUTF8=1 where it is one of UTF-8",
            EXIT_FAILED,
        )
    from zipfile import BadZipFile  # not above, where it would slow every start

    if isinstance(error, BadZipFile):
        return f"a file is damaged ({error}): {_COPY_AGAIN}", EXIT_FAILED
    for kind, what, remedy in _PARSERS:
        if isinstance(error, kind):
            return f"{what} ({error}): {remedy}", EXIT_FAILED
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path holds a null character: correct it", EXIT_USER_ERROR
    return None


def find_remedy(number: int | None) -> str:
    """What to do about an error of the operating system, by its number."""
    return _REMEDIES.get(number or 0, _OTHER_REMEDY)


def _describe_os_error(error: OSError) -> tuple[str, int]:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    place = _shorten(" -> ".join(names)) if names else "the operating system"
    reason = error.strerror or str(error) or type(error).__name__
    return (
        f"{place}: {reason}: {find_remedy(error.errno)}",
        EXIT_USER_ERROR if error.errno in _NAME_ERRORS else EXIT_FAILED,
    )


def _shorten(text: str) -> str:
    shown = text.encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= _MAX_SHOWN_CHARS else f"{shown[:100]}...{shown[-100:]}"


_MAX_SHOWN_CHARS = 300
_COPY_AGAIN = "copy the files again"
_PARSERS: tuple[tuple[type[Exception], str, str], ...] = (
    (UnicodeDecodeError, "a file holds bytes that are no text", "save it as UTF-8"),
    (json.JSONDecodeError, "a file is no valid JSON", _COPY_AGAIN),
    (struct.error, "a binary file is cut short", _COPY_AGAIN),
    (EOFError, "a file or the input ends too early", _COPY_AGAIN),
    (RecursionError, "something is nested too deep to be read", "flatten it"),
    (OverflowError, "a number is too large", "give a smaller one"),
)
