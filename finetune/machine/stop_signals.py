"""Signals that ask a process to stop: Ctrl-C (SIGINT), SIGTERM, and SIGHUP of a terminal that closes.

A command ends at the first one in one line. A launcher that ends a run repeats SIGTERM, and a terminal sends Ctrl-C to
the launcher and to every process under it, so that repeats of SIGTERM and SIGHUP mean nothing; a second Ctrl-C ends at
once. A signal that was ignored when the command began stays ignored (`nohup`, jobs of a shell in the background).

Training finishes its step and saves it first: `finetune.training.stop_signal`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from finetune.errors import EXIT_FAILED, Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, FrameType | None], None]


def set_handlers(handler: Handler) -> dict[int, Handler | int | None]:
    """Sets what the signals do, but for those that are ignored.

    Returns:
        What each that was set did before.
    """
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def end_command(number: int, _frame: FrameType | None) -> None:
    """Ends a command that has nothing to save.

    Raises:
        Interrupted: Always.
    """
    hear_repeats()
    raise Interrupted(
        f"stopped by signal {signal.Signals(number).name}; start the same command again to continue"
    )


def end_at_once(number: int, _frame: FrameType | None) -> None:
    """Ends the process without cleaning up; written past Python's buffers, which the interrupted code may hold."""
    os.write(2, f"\ninterrupted: ended at once by signal {signal.Signals(number).name}\n".encode())
    os._exit(EXIT_FAILED)


def hear_repeats() -> None:
    """From now on, while the command cleans up, only Ctrl-C is heard, and ends at once."""
    _hear_only_ctrl_c(_pass_over)


def ignore_repeats() -> None:
    """The same for the end of the process, in which Python gives handlers of its own up."""
    _hear_only_ctrl_c(signal.SIG_IGN)


def _hear_only_ctrl_c(others: Handler | signal.Handlers) -> None:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end_at_once if number == signal.SIGINT else others)


def _pass_over(_number: int, _frame: FrameType | None) -> None:
    # Not SIG_IGN: Python complains when that is set while a signal is under way.
    return


@contextmanager
def delayed() -> Iterator[None]:
    """Within the block signals wait.

    For the import of Paddle, whose C++ part takes an exception of a handler for a fault of its own, and sets a handler
    for SIGTERM that prints a stack.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        renew_handlers()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def kept_from_threads() -> Iterator[None]:
    """Threads that start within the block never get the signals, so that `delayed` holds for the whole process."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def renew_handlers() -> None:
    """Sets what Python knows to be set; libraries in C++ may have set something else, or nothing, behind its back.

    Only the main thread may do so. Who imports such a library in another thread has the main thread do it afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in STOP_SIGNALS:
        if (handler := signal.getsignal(number)) is not None:  # None: set by code that is not Python
            signal.signal(number, handler)
