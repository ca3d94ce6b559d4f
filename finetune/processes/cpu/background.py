"""Collectives of a CPU process group that run beside the computation, one after the other, in a thread of their own.

The main thread hands over what a collective sends and goes on; the thread exchanges and adds up, mostly outside of
Python's lock; the result is written into the caller's tensor when somebody waits for it, in the main thread, because
nothing else may touch Paddle's tensors while they are computed with. One thread for each group keeps the order of its
collectives, which is the same on all ranks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

Exchange = Callable[[], NDArray[Any]]


class Pending:
    """The task of a collective that has begun.

    Args:
        exchange: Runs in the thread and gives the result.
        write: Takes the result over when somebody waits for it.
    """

    def __init__(self, exchange: Exchange, write: Callable[[NDArray[Any]], None]):
        self._exchange, self._write = exchange, write
        self._done = threading.Event()
        self._is_written = False
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Runs the exchange; its error is kept for `wait`."""
        try:
            self._result = self._exchange()
        except BaseException as error:  # whatever it is belongs to the one who waits
            self._error = error
        self._done.set()

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self._done.is_set()

    def finish(self) -> None:
        """Returns when the exchange is over; its result is not taken over yet."""
        self._done.wait()

    def wait(self, *_: Any) -> bool:
        """Returns when the tensor holds the result.

        Raises:
            PeerLostError: Another rank is gone.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        if not self._is_written:
            self._is_written = True
            self._write(self._result)
            self._result = None
        return True

    synchronize = wait


class BackgroundThread:
    """Runs a group's exchanges in the order in which they begin; started with the first."""

    def __init__(self, name: str):
        self._name = name
        self._begun: queue.SimpleQueue[Pending] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Pending | None = None

    def begin(self, task: Pending) -> Pending:
        """Queues a task."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name=self._name)
            self._thread.start()
        self._last = task
        self._begun.put(task)
        return task

    def finish_earlier(self) -> None:
        """Returns when everything that has begun is exchanged, so that a collective of the main thread may follow."""
        if self._last is not None:
            self._last.finish()
            self._last = None

    def _run(self) -> None:
        while True:
            self._begun.get().run()
