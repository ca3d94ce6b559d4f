"""What the watch tells people: tables of phases, the last lines of a log, and the end of a process."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune.machine.screen import format_for

_TAIL_BYTES = 3000
_TAIL_LINES = 20


@dataclass(frozen=True)
class Place:
    """Where a rank runs and writes its output.

    Attributes:
        rank: Global rank.
        machine: Host name and address.
        log: File that the launcher writes this rank's output into, or "".
        log_start: Its size in bytes when this run began; older lines belong to an earlier run.
    """

    rank: int
    machine: str
    log: str
    log_start: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.machine}"


def own_place(rank: int, endpoint: str) -> Place:
    """The place of this process.

    Args:
        rank: Its global rank.
        endpoint: Its "address:port", as the launcher gave it.
    """
    machine = f"{socket.gethostname()} ({endpoint.rpartition(':')[0]})"
    with suppress(OSError):
        status = os.fstat(2)
        if stat.S_ISREG(status.st_mode):
            return Place(rank, machine, os.readlink("/proc/self/fd/2"), status.st_size)
    return Place(rank, machine, "", 0)


def tail_of(place: Place) -> list[str]:
    """The last lines of a rank's log, below a heading; nothing where there is no log."""
    if not place.log:
        return []
    try:
        with open(place.log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(min(place.log_start, end), end - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    except OSError:
        return []
    name = Path(place.log).name
    return [f"--- last lines of {place} ({name}):", *lines, "---"] if lines else []


def show_message(lines: Sequence[str]) -> None:
    """Writes lines to stderr, at once."""
    if lines:
        with suppress(OSError, ValueError):
            sys.stderr.write("\n".join(format_for(line, sys.stderr) for line in lines) + "\n")
            sys.stderr.flush()


def end_process(code: int) -> None:
    """Ends this process from any thread, whatever its main thread is stuck in."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@dataclass(frozen=True)
class RankState:
    """One row of the table.

    Attributes:
        place: Which rank, and where.
        phase: What it does.
        phase_seconds: For how long.
        silent_seconds: Since when nothing was heard from it.
    """

    place: Place
    phase: str
    phase_seconds: float
    silent_seconds: float


def phase_table(states: Sequence[RankState]) -> list[str]:
    """Every rank's last phase, as lines of a table."""
    rows = [("rank", "host", "last phase", "since")]
    for state in states:
        since = f"{state.phase_seconds:.0f} s"
        if state.silent_seconds >= 10:
            since += f", no sign of life for {state.silent_seconds:.0f} s (stopped, or busy in one call)"
        rows.append((str(state.place.rank), state.place.machine, state.phase, since))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"{rank:>{widths[0]}}  {host:<{widths[1]}}  {phase:<{widths[2]}}  {since}"
        for rank, host, phase, since in rows
    ]
