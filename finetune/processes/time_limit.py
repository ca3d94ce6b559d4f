"""An end for calls that may hang outside Python."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Iterator

from finetune.machine.screen import print_text


@contextlib.contextmanager
def time_limit(seconds: float, task: str) -> Iterator[None]:
    """Ends the process with exit code 1 and a message if the body takes longer.

    For calls that may hang outside Python, where no exception could be raised: the group creation of Paddle.

    Args:
        seconds: The limit.
        task: What is being done, for the message.
    """
    rank = os.environ.get("PADDLE_TRAINER_ID", "0")

    def give_up() -> None:
        print_text(f"rank {rank}: {task} took more than {seconds:g} s; the process ends", stream=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    # A call that holds the interpreter's lock would keep the timer from running; this one needs no lock.
    with contextlib.suppress(ValueError, RuntimeError):  # stderr is no real file
        faulthandler.dump_traceback_later(seconds + 5, exit=True)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
