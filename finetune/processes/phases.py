"""What this process is doing right now, noted so cheaply that every micro-batch can say it."""

from __future__ import annotations

import time
from typing import NamedTuple


class Phase(NamedTuple):
    """A piece of work that a process has begun.

    Attributes:
        name: What it is, such as "backward".
        step: Optimizer step it belongs to, counted from 1 as in the log; None outside of steps.
        since: Beginning, in seconds of the monotonic clock.
    """

    name: str
    step: int | None
    since: float

    def __str__(self) -> str:
        return self.name if self.step is None else f"{self.name} of step {self.step}"


class PhaseRecord:
    """What a process does, told by whoever does it and read by the thread that watches over the processes.

    Attributes:
        current: What was begun last.
    """

    def __init__(self) -> None:
        self.current = Phase("start", None, time.monotonic())

    def enter(self, name: str, step: int | None = None) -> None:
        """Notes what begins now; costs one assignment, so call it for every step, save and evaluation."""
        self.current = Phase(name, step, time.monotonic())
