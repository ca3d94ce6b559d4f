"""What both ends of the watch share: a thread that looks at its connections twice a second."""

from __future__ import annotations

import faulthandler
import selectors
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from finetune.errors import RunError
from finetune.machine.stop_signals import kept_from_threads
from finetune.processes.deadline import end_at_latest
from finetune.processes.network.secret import JobSecret
from finetune.processes.phases import PhaseRecord
from finetune.processes.watch.link import Message
from finetune.processes.watch.report import Place, end_process, show_message
from finetune.processes.watch.siblings import Siblings, describe_gone

BEAT_SECONDS = 2.0
_LOOK_SECONDS = 0.5
_LAST_CALL_SECONDS = 20.0
_LEAVE_SECONDS = 5.0


class PeersUnreachable(RunError):
    """Some processes of the launch cannot be reached; the message names their hosts."""


class WatchThread(ABC):
    """A daemon thread that watches from one process.

    Args:
        place: Where this process runs.
        endpoints: "address:port" of all ranks, as the launcher gave them.
        points: Addresses where rank 0 may listen.
        secret: How this process comes to the key of the run.
        phases: What this process does.
        hang_seconds: How long a rank may stay in one phase before it is reported; 0 means for ever.
    """

    def __init__(
        self,
        place: Place,
        endpoints: list[str],
        points: list[tuple[str, int]],
        *,
        secret: JobSecret,
        phases: PhaseRecord,
        hang_seconds: float,
    ):
        self.place = place
        self.endpoints = endpoints
        self.points = points
        self.secret = secret
        self.hang_seconds = hang_seconds
        self.selector = selectors.DefaultSelector()
        self.lock = threading.RLock()
        self.all_here = threading.Event()
        self.failing = False
        self.ended = threading.Event()
        self.closed = False
        self._siblings = Siblings()
        self._last_beat = 0.0
        self.phases, self._last_phase = phases, phases.current
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    # ---------------------------------------------------------------- called by the main thread

    @abstractmethod
    def connect(self, deadline: float) -> None:
        """Returns when every rank is connected; raises PeersUnreachable at the deadline (monotonic seconds)."""

    @abstractmethod
    def goodbye(self, lines: Sequence[str] = ()) -> None:
        """Tells the other ranks that this one is done (rank 0: with lines to show), and closes every connection."""

    @abstractmethod
    def note_failure(self, text: str, code: int) -> None:
        """Tells the other ranks that this one ends with an error."""

    def start(self) -> None:
        """Starts watching."""
        with kept_from_threads():
            self._thread.start()

    def wait_for_all(self, deadline: float) -> bool:
        """Whether all ranks have connected before the deadline (monotonic seconds).

        Raises:
            PeersUnreachable: One that this machine's launcher has started runs no more.
        """
        while not self.all_here.wait(min(_LOOK_SECONDS, max(deadline - time.monotonic(), 0))):
            if time.monotonic() >= deadline:
                return False
            self.check_siblings()
        return True

    def check_siblings(self) -> None:
        """Raises PeersUnreachable when a rank of this machine has ended; for the time before all are connected."""
        gone = self._siblings.find_gone()
        if gone and not self.all_here.is_set() and not self.ended.is_set():
            raise PeersUnreachable(describe_gone(gone))

    def close(self) -> None:
        """Says goodbye once."""
        with self.lock:
            if not self.closed:
                self.closed = True
                self.goodbye()

    def fail(self, text: str, code: int) -> None:
        """Tells of an error and returns when rank 0 has taken note of it."""
        with self.lock:
            if self.closed or not self._thread.is_alive():
                return
            self.failing = True
            end_at_latest(_LAST_CALL_SECONDS + _LEAVE_SECONDS)
            self.note_failure(text, code)
        self.ended.wait(_LAST_CALL_SECONDS)

    def forget(self) -> None:
        """Drops this process's copies of the connections, without a word to the others; for forked children."""
        self.closed = True
        for one in self.sockets():
            with suppress(OSError):
                one.close()
        self.selector.close()  # only this copy: the parent's goes on selecting

    # ---------------------------------------------------------------- the thread

    @abstractmethod
    def sockets(self) -> list[Any]:
        """What is open: links and listening sockets."""

    @abstractmethod
    def beat(self, message: Message) -> None:
        """Sends what this process does to the others."""

    @abstractmethod
    def look(self) -> None:
        """Does what time demands; called at least every half second."""

    def _run(self) -> None:
        try:
            while not self.closed:
                ready = self.selector.select(_LOOK_SECONDS)
                with self.lock:
                    for key, _ in ready:
                        if not self.closed:
                            key.data()
                    if not self.closed:
                        self._beat_when_due()
                        self.look()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """After a fault in the watch itself: says so and lets the run go on without it."""
        with self.lock:
            if self.closed:
                return
            self.closed = True
            why = f"has ended by a fault of its own ({type(error).__name__}: {error})"
            rest = "the run goes on, but processes that wait for one that dies may now wait for long"
            show_message([f"warning: the watch of {self.place} {why}; {rest}"])
            with suppress(Exception):
                self.goodbye([f"warning: {self.place} watches no more, as its watch {why}; {rest}"])
        self.all_here.set()
        self.ended.set()

    def _beat_when_due(self) -> None:
        now, phase = time.monotonic(), self.phases.current
        changed = phase[:2] != self._last_phase[:2]
        if now - self._last_beat >= (_LOOK_SECONDS if changed else BEAT_SECONDS):
            self._last_beat, self._last_phase = now, phase
            self.beat({"phase": str(phase), "seconds": now - phase.since})

    def show_stacks(self) -> None:
        """Writes what every Python thread of this process is doing to stderr, which the launcher keeps."""
        with suppress(OSError, ValueError, AttributeError):
            show_message([f"what {self.place} is doing:"])
            faulthandler.dump_traceback(file=sys.stderr)

    def end(self, code: int) -> None:
        """Ends this process; where it is ending by itself already, gives it time to do so."""
        self.closed = True
        self.ended.set()
        if self.failing:
            time.sleep(_LEAVE_SECONDS)  # leaving may hang in what other ranks left unfinished
        end_process(code)
