"""What a limit of the address space (`ulimit -v`) leaves, and how libraries say that memory has run out.

A limit that Paddle cannot even be imported under is told before the import: below it, parts of it in C++ end the process
by themselves, or never come back.
"""

from __future__ import annotations

import errno
import re
import resource

from finetune.errors import EXIT_USER_ERROR, UserError
from finetune.machine.screen import show_line

GIBIBYTE = 1 << 30
PADDLE_BYTES = 2 * GIBIBYTE
"""Paddle, PaddleNLP and what they import take 1.6 GiB of addresses for a tiny model, most of them for code."""
_NUMPY_BYTES = GIBIBYTE // 4
"""NumPy with OpenBLAS, which below this fails in its import, or in the threads that end with the process."""

_SAYS_MEMORY = re.compile(
    r"bad_?alloc|ResourceExhausted|[Cc]annot allocate memory|[Oo]ut of memory|failed to map segment|"
    r"[Ff]ail(ed)? to alloc|can't start new thread|insufficient memory|could not create a (primitive|memory)"
)
"""The C++ library, Paddle's allocator, the system, the loader of shared libraries, Python's threads, oneDNN."""
_MAX_REASON = 120
_REMEDY = "free memory, or take less at once, such as a smaller batch"


def address_space_limit() -> int | None:
    """Bytes of addresses that this process may use; None where nothing limits them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def require_address_space() -> None:
    """Ends a command under a limit that not even NumPy can be imported under; to be called before that import."""
    limit = address_space_limit()
    if limit is not None and limit < _NUMPY_BYTES:
        show_line(f"error: {_describe_limit(limit, 'NumPy', _NUMPY_BYTES)}")
        raise SystemExit(EXIT_USER_ERROR)


def check_address_space(needed_bytes: int = PADDLE_BYTES) -> None:
    """Compares the limit with what has to be loaded, before it is.

    Raises:
        UserError: It is smaller.
    """
    limit = address_space_limit()
    if limit is not None and limit < needed_bytes:
        raise UserError(_describe_limit(limit, "Paddle", needed_bytes))


def describe_memory_failure(error: BaseException | None) -> str | None:
    """What to say of memory that ran out, and of the limit if there is one; None where an error has another cause.

    Args:
        error: Whatever was raised; what it was raised from, or while it was handled, counts, too.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if _is_of_memory(error):
            return _describe(error)
        error = error.__cause__ or error.__context__
    return None


def _describe_limit(limit: int, who: str, needed_bytes: int) -> str:
    return (
        f"the address space of this process is limited to {_gibibytes(limit)} (ulimit -v), but {who} alone needs "
        f"{_gibibytes(needed_bytes)}: raise the limit (ulimit -v unlimited)"
    )


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    kinds = (RuntimeError, ImportError, OSError, SystemError)
    return isinstance(error, kinds) and _SAYS_MEMORY.search(str(error)) is not None


def _describe(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if _SAYS_MEMORY.search(line)), lines[0] if lines else "")
    if len(said) > _MAX_REASON:
        said = said[: _MAX_REASON - 3] + "..."
    limit = address_space_limit()
    text = "not enough memory" + (f" ({said})" if said else "")
    if limit is None:
        return f"{text}: {_REMEDY}"
    return (
        f"{text}; the address space of this process is limited to {_gibibytes(limit)} (ulimit -v): raise that limit, "
        f"{_REMEDY}"
    )


def _gibibytes(number: int) -> str:
    return f"{number / GIBIBYTE:.2f} GiB" if number >= GIBIBYTE else f"{number / (1 << 20):.0f} MiB"
