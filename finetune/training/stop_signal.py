"""The wish to stop: on SIGTERM the step in progress is finished and saved, then the run ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune.errors import Interrupted
from finetune.processes.watch.watch import close_watch


class StopSignal:
    """What this process was told.

    Attributes:
        number: The signal that arrived, None as long as there is none.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within the block a signal is noted instead of ending the process."""
        previous = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def end_run(self, step: int, max_steps: int) -> None:
        """Ends the run after a step that is saved; all processes call it, also those that were told nothing.

        Raises:
            Interrupted: Always; with the signal, SIGTERM where another process got it.
        """
        close_watch()  # all processes end here
        name = signal.Signals(self.number or signal.SIGTERM).name
        raise Interrupted(
            f"stopped by signal {name} after step {step} "
            f"of {max_steps}; it is saved, start the same command again to continue"
        )

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
