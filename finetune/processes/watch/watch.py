"""Every process of a run knows within seconds when another one dies, and who it was.

A thread in every process keeps one connection to rank 0. What travels on it is each rank's last phase, every
`BEAT_SECONDS`, and how ranks end. Three things can happen:

- A rank dies (killed, crashed, out of memory) or its machine can no longer be reached: rank 0 says which one and what
  it did last, the lowest surviving rank on its machine shows the end of its log, and every process ends with code 1.
  A collective that waits for the dead rank cannot hold that up.
- A rank fails and says so (`report_failure`): the others end too, with its code and its words.
- Nothing moves: after `hang_seconds` without a new phase on some rank, rank 0 prints what every rank does and all
  ranks write their Python stacks into their logs. Nothing is ended then, as slow work looks the same from here.

The connections are made among processes that know the run's secret (`finetune/processes/network/`); when all have
come, nobody else can connect any more. Should the watch itself fail, it says so and the run goes on without it.

The watch starts before Paddle's process groups and needs nothing of Paddle, so it also names the machines that
cannot be reached at all.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from finetune.processes.deadline import end_at_latest
from finetune.processes.network.secret import JobSecret
from finetune.processes.phases import PhaseRecord
from finetune.processes.watch.hub import Hub
from finetune.processes.watch.link import meeting_points
from finetune.processes.watch.member import Member
from finetune.processes.watch.report import own_place
from finetune.processes.watch.thread import PeersUnreachable, WatchThread

__all__ = ["PeersUnreachable", "close_watch", "report_failure", "start_watch"]

CONNECT_SECONDS = 120
_LEAVE_SECONDS = 120.0

_watch: WatchThread | None = None


def start_watch(
    phases: PhaseRecord,
    *,
    hang_seconds: float = 600,
    connect_seconds: float = CONNECT_SECONDS,
    shared_folder: Path | None = None,
) -> None:
    """Connects this process to the others of its launch, and returns when all are there.

    Does nothing in a run of one process. Must be called on every rank.

    Args:
        phases: What this process does.
        hang_seconds: How long a rank may stay in one phase before all phases are printed; 0 means for ever.
        connect_seconds: How long to wait for ranks that have not come up.
        shared_folder: A folder that all hosts see, for the run's secret where the environment has none.

    Raises:
        PeersUnreachable: Some ranks did not come, or rank 0 cannot be reached from here; the message names the hosts.
        UserError: The processes have no secret in common.
    """
    global _watch
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) == 1 or _watch is not None:
        return
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    endpoints = os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")
    place = own_place(rank, endpoints[rank])
    kind = Hub if rank == 0 else Member
    secret = JobSecret(endpoints, shared_folder)
    thread = kind(place, endpoints, meeting_points(), secret=secret, phases=phases, hang_seconds=hang_seconds)
    _watch = thread
    # A forked data worker would keep the connection open after its parent's death, and so hide it.
    os.register_at_fork(after_in_child=thread.forget)
    thread.connect(deadline=time.monotonic() + connect_seconds)


def close_watch() -> None:
    """Says goodbye: from now on this process may end without the others taking it for dead, and must do so soon."""
    if _watch is not None:
        _watch.close()
        end_at_latest(_LEAVE_SECONDS)


def report_failure(text: str, code: int = 1) -> None:
    """Tells the other ranks that this one ends with an error, and waits until they know; then end the process.

    Call it after the error has been written to this rank's stderr. Does nothing in a run of one process, or after
    `close_watch`.

    Args:
        text: The error in one line or several.
        code: Exit code. With 2, which every rank may be about to find on its own, the others get some seconds to do
            so before they are ended.
    """
    if _watch is not None:
        with suppress(OSError):
            _watch.fail(text, code)
