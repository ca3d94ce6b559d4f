"""An end that a process cannot miss, whatever it is blocked in."""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from contextlib import suppress

_LAST_RESORT_SECONDS = 5.0

_ends_at: float | None = None


def end_at_latest(seconds: float) -> None:
    """Ends this process after that time; from any thread, and for good: nothing takes it back.

    A thread of ours could not promise that. Once the interpreter has begun to finalize, no Python code of a daemon
    thread runs any more, while the process may still wait: for a thread that is joined, in a library's destructor
    that wants a last word from another rank. So the first limit is kept by a thread without Python (it shows what
    every thread was doing, and exits with 1), and the second by the kernel's timer, whose signal ends the process.

    Args:
        seconds: From now; an earlier end that is set already stays.
    """
    global _ends_at
    ends_at = time.monotonic() + seconds
    if _ends_at is not None and _ends_at <= ends_at:
        return
    _ends_at = ends_at
    with suppress(OSError, ValueError, AttributeError, RuntimeError):  # stderr is no real file
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.stderr)
    if signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:  # somebody else's timer is left alone
        signal.setitimer(signal.ITIMER_REAL, seconds + _LAST_RESORT_SECONDS)
