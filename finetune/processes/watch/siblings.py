"""Which processes of the same launcher still run, before they have found each other.

A launcher ends the others when it sees one fail, if it still lives itself; without it a rank that dies before it has
connected would be waited for until the time for connecting is over. Linux shows the environment that each process was
started with to its user, and in it the launcher's words for its rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

GONE_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_JOB = "PADDLE_TRAINER_ENDPOINTS"
_RANK = "PADDLE_TRAINER_ID"


class Siblings:
    """The ranks that the launcher of this process has started with it.

    Args:
        environment: What the launcher says.
        processes: Where the system shows processes.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, processes: Path = Path("/proc")):
        self._processes = processes
        self._job, self._rank = environment.get(_JOB, ""), int(environment.get(_RANK, "0"))
        first = self._rank - int(environment.get("PADDLE_LOCAL_RANK", "0"))
        self._ranks = range(first, first + int(environment.get("PADDLE_LOCAL_SIZE", "1")))
        self._seen = dict.fromkeys(self._ranks, time.monotonic())
        self._looked = 0.0

    def find_gone(self) -> list[int]:
        """Ranks of which there has been no process for `GONE_SECONDS`; none where the system does not tell."""
        now = time.monotonic()
        if len(self._ranks) > 1 and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            running = set(self._running())
            # Where not even this one is found, nothing is known of the others.
            self._seen |= dict.fromkeys(running if self._rank in running else self._ranks, now)
        return [rank for rank in self._ranks if now - self._seen[rank] > GONE_SECONDS]

    def _running(self) -> Iterator[int]:
        wanted = f"{_JOB}={self._job}".encode()
        for path in self._processes.glob("[0-9]*/environ"):
            with suppress(OSError, ValueError):  # another user's, or ended meanwhile
                entries = path.read_bytes().split(b"\0")
                if wanted in entries:
                    name = next(entry for entry in entries if entry.startswith(f"{_RANK}=".encode()))
                    yield int(name.partition(b"=")[2])


def describe_gone(ranks: list[int]) -> str:
    """That ranks have ended, for a message."""
    one = len(ranks) == 1
    return (
        f"rank {', '.join(map(str, ranks))} of this machine {'has' if one else 'have'} ended before all ranks had "
        f"connected: {'its own log says' if one else 'their own logs say'} why"
    )
