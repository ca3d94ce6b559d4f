"""The wish to stop: on a signal the step in progress is finished and saved, then the run ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from finetune.errors import Interrupted
from finetune.machine.stop_signals import hear_repeats, set_handlers
from finetune.processes.launch import is_first_process
from finetune.processes.watch.watch import close_watch


class StopSignal:
    """What this process was told.

    Attributes:
        number: The signal that arrived first, None as long as there is none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._was_interrupted = False  # by Ctrl-C
        self._is_ended = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Within the block a signal is noted instead of ending the process; a second Ctrl-C ends it at once."""
        previous = set_handlers(self._note)
        try:
            yield
        finally:
            if not self._is_ended:
                for number, handler in previous.items():
                    signal.signal(number, handler)

    def end_run(self, step: int, max_steps: int) -> None:
        """Ends the run after a step that is saved; all processes call it, also those that were told nothing.

        Raises:
            Interrupted: Always; with the signal, SIGTERM where another process got it.
        """
        self._is_ended = True
        hear_repeats()
        close_watch()  # all processes end here
        name = signal.Signals(self.number or signal.SIGTERM).name
        raise Interrupted(
            f"stopped by signal {name} after step {step} "
            f"of {max_steps}; it is saved, start the same command again to continue"
        )

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._was_interrupted:
            self._is_ended = True
            hear_repeats()
            raise Interrupted(
                "stopped at once by a second SIGINT; the steps since the last save are lost, start the same command "
                "again to continue from it"
            )
        if self.number is None and is_first_process():
            # Past Python's buffers: the line in progress may be what was interrupted.
            os.write(
                2, b"\nstopping: this step is finished and saved first (Ctrl-C once more ends at once)\n"
            )
        self.number = self.number or number
        self._was_interrupted = self._was_interrupted or number == signal.SIGINT
