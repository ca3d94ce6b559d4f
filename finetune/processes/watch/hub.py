"""The watch of rank 0: a connection to every other rank, and the decision when a run is over."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from finetune.processes.deadline import end_at_latest
from finetune.processes.network.listener import MAX_UNPROVEN, Listener, allow_open_files, listen
from finetune.processes.watch.link import PURPOSE, Link, Message
from finetune.processes.watch.report import Place, RankState, phase_table, show_message, tail_of
from finetune.processes.watch.thread import BEAT_SECONDS, PeersUnreachable, WatchThread

_END_SECONDS = 30.0
_OTHER_FILES = 256
_LOSSES = {
    "gone": "is gone (killed or crashed",
    "unreachable": "cannot be reached any more (no answer",
    "garbled": "sent something else than messages of this program (are the versions the same on all hosts?",
}
_GRACE_SECONDS = {1: 1.0, 2: 10.0}
"""How long other ranks may still tell their own troubles, by the exit code of the first one's."""


@dataclass
class Peer:
    """What rank 0 knows of another rank.

    Attributes:
        place: Where it runs.
        link: The connection, None before it came and after it ended.
        phase: What it said last that it does.
        phase_since: Since when, in seconds of this process's monotonic clock.
        heard: When its last message came.
        is_here: It has said where it runs.
        is_done: It said goodbye.
        has_failed: It said that it ends with an error, or it died.
    """

    place: Place
    link: Link | None = None
    phase: str = "not connected"
    phase_since: float = 0.0
    heard: float = 0.0
    is_here: bool = False
    is_done: bool = False
    has_failed: bool = False


class Hub(WatchThread):
    """Watches all other ranks."""

    def __init__(self, place: Place, endpoints: list[str], points: list[tuple[str, int]], **options: Any):
        super().__init__(place, endpoints, points, **options)
        self.peers = {
            rank: Peer(Place(rank, f"host {endpoint.rpartition(':')[0]}", "", 0))
            for rank, endpoint in enumerate(endpoints)
            if rank
        }
        self._listener: Listener | None = None
        self._deaths: list[str] = []
        self._failures: list[str] = []
        self._own_failure: str | None = None
        self._codes: list[int] = []
        self._end_at: float | None = None
        self._hang_told = time.monotonic()

    # ---------------------------------------------------------------- called by the main thread

    def connect(self, deadline: float) -> None:
        """Waits for the others."""
        key = self.secret.issue()
        allow_open_files(len(self.endpoints) + MAX_UNPROVEN + _OTHER_FILES)
        spans_hosts = len({one.rpartition(":")[0] for one in self.endpoints}) > 1
        server = listen(self.points, spans_hosts=spans_hosts)
        self._listener = Listener(server, key, PURPOSE, selector=self.selector, admit=self._admit)
        self.start()
        text = ""
        try:
            if self.wait_for_all(deadline):
                return
        except PeersUnreachable as error:
            text = str(error)
        with self.lock:
            text = text or self._missing()
            self._tell({"end": 1, "lines": [f"error: {text}"], "tails": {}})
            self.close()
        raise PeersUnreachable(text)

    def _missing(self) -> str:
        missing = [peer for peer in self.peers.values() if not peer.is_here]
        machines: dict[str, list[int]] = {}
        for peer in missing:
            machines.setdefault(peer.place.machine, []).append(peer.place.rank)
        named = "; ".join(
            f"{machine}: rank {', '.join(map(str, ranks))}" for machine, ranks in machines.items()
        )
        refused = self._listener.num_refused if self._listener else 0
        doubt = (
            f" {refused} connections were refused because they came with another secret: {self.secret.where()} must be "
            "the same for all ranks."
            if refused
            else ""
        )
        return (
            f"{len(missing)} of {len(self.endpoints)} ranks did not connect to rank 0 at "
            f"{self.points[0][0]} ({named}): check that they started (see the launcher's log there), that those "
            "hosts can reach this address (--host sets it), and that no firewall is between them."
        ) + doubt

    def goodbye(self, lines: Sequence[str] = ()) -> None:
        """Lets the other ranks finish unwatched."""
        self._tell({"bye": True, "lines": [*lines]})
        self._close_entrance()
        for one in self.sockets():
            one.close()

    def note_failure(self, text: str, code: int) -> None:
        """Has all ranks end, those with troubles of their own first."""
        self._own_failure = text
        self._expect_end(code)

    # ---------------------------------------------------------------- the thread

    def sockets(self) -> list[Any]:
        """All links, the listening socket and who has come to it."""
        links = [peer.link for peer in self.peers.values() if peer.link]
        return [*links, *(self._listener.sockets() if self._listener else [])]

    def _admit(self, rank: int, connection: socket.socket) -> bool:
        """Connects a rank that has proved to belong to the run."""
        peer = self.peers.get(rank)
        if peer is None or peer.link is not None:
            return False
        peer.link = Link(connection)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._read(peer))
        return True

    def _read(self, peer: Peer) -> None:
        """Takes messages of a rank, or its end."""
        link = peer.link
        if link is None:
            return
        messages = link.receive()
        for message in messages or []:
            self._take(peer, message)
        if messages is None:
            self._lose(peer, link)

    def _welcome(self, peer: Peer, place: Place) -> None:
        peer.place, peer.is_here, peer.phase = replace(place, rank=peer.place.rank), True, "start"
        peer.phase_since = time.monotonic()
        if peer.link:
            peer.link.send({"hello": asdict(self.place)})
        if all(other.is_here for other in self.peers.values()):
            self._close_entrance()
            self._tell({"all_here": True})
            self._hang_told = time.monotonic()
            self.all_here.set()

    def _close_entrance(self) -> None:
        """Nobody is expected any more, so nobody can connect any more."""
        if self._listener:
            self._listener.close()
        self._listener = None
        self.secret.withdraw()

    def _take(self, peer: Peer, message: Message) -> None:
        peer.heard = time.monotonic()
        if "hello" in message:
            self._welcome(peer, Place(**message["hello"]))
        elif "phase" in message:
            peer.phase, peer.phase_since = message["phase"], peer.heard - message["seconds"]
        elif "bye" in message:
            peer.is_done, peer.phase = True, "finished"
        elif "failed" in message:
            peer.has_failed, peer.phase = True, "failed"
            self._failures.append(f"{peer.place} failed: {message['failed']}")
            self._expect_end(message["code"])

    def _lose(self, peer: Peer, link: Link) -> None:
        self.selector.unregister(link.socket)
        link.close()
        peer.link = None
        if peer.is_done or peer.has_failed or not peer.is_here:
            return
        peer.has_failed = True
        how = _LOSSES[link.fault]
        line = f"error: {peer.place} {how}; last phase: {peer.phase}); all processes of the run end"
        show_message([line])
        self._deaths.append(line)
        self._expect_end(1)

    def _expect_end(self, code: int) -> None:
        if not self._codes:
            end_at_latest(_END_SECONDS)
        self._codes.append(code)
        end_at = time.monotonic() + _GRACE_SECONDS[min(max(code, 1), 2)]
        self._end_at = end_at if self._end_at is None else min(self._end_at, end_at)

    def look(self) -> None:
        """Ends the run when it is time, or says that it hangs."""
        if self._listener:
            self._listener.expire()
        if self._end_at is not None:
            everyone = all(peer.has_failed or peer.is_done for peer in self.peers.values())
            if time.monotonic() >= self._end_at or (everyone and self.failing):
                self._end_run()
        elif self.all_here.is_set() and self.hang_seconds:
            self._report_hang()

    def _end_run(self) -> None:
        # What ranks complain of when another one has died is that death.
        failures = [] if self._deaths else self._new_failures()
        show_message(failures)
        tails: dict[str, list[Place]] = {}
        for peer in self.peers.values():
            if peer.link is None and not peer.is_done:
                tails.setdefault(str(self._survivor_near(peer.place)), []).append(peer.place)
        for place in tails.pop("0", []):
            show_message(tail_of(place))
        code = 2 if set(self._codes) == {2} else 1
        known = {rank: [asdict(place) for place in places] for rank, places in tails.items()}
        self._tell({"end": code, "lines": self._deaths + failures, "tails": known})
        self._close_entrance()
        self.end(code)

    def _new_failures(self) -> list[str]:
        """What other ranks failed of, in the order in which they said it; not what this one has said itself."""
        own = self._own_failure
        others = [one for one in self._failures if own is None or not one.endswith(f" failed: {own}")]
        return [f"error: {one}" for one in dict.fromkeys(others)]

    def _survivor_near(self, place: Place) -> int:
        """The lowest rank that lives on the same machine and can read the log there; -1 where none does."""
        if self.place.machine == place.machine:
            return 0
        near = [
            peer.place.rank
            for peer in self.peers.values()
            if peer.link is not None and peer.place.machine == place.machine
        ]
        return min(near, default=-1)

    def _report_hang(self) -> None:
        now = time.monotonic()
        states = self.states(now)
        longest = max(states, key=lambda state: -1 if state.phase == "finished" else state.phase_seconds)
        if longest.phase_seconds < self.hang_seconds or now - self._hang_told < self.hang_seconds:
            return
        self._hang_told = now
        heading = f"warning: {longest.place} has been in one phase for {longest.phase_seconds:.0f} s; every rank's last phase:"
        show_message([heading, *phase_table(states)])
        self._tell({"hang": True})
        self.show_stacks()

    def states(self, now: float) -> list[RankState]:
        """What every rank does, by rank."""
        own = self.phases.current
        others = [
            RankState(peer.place, peer.phase, now - peer.phase_since, 0 if peer.is_done else now - peer.heard)
            for peer in self.peers.values()
        ]
        return [RankState(self.place, str(own), now - own.since, 0), *others]

    def beat(self, message: Message) -> None:
        """Tells the others what rank 0 does; not those that are stopped, so that nothing piles up for them."""
        now = time.monotonic()
        for peer in self.peers.values():
            if peer.link and peer.is_here and now - peer.heard < 5 * BEAT_SECONDS:
                peer.link.send(message)

    def _tell(self, message: Message) -> None:
        for peer in self.peers.values():
            if peer.link and peer.is_here:
                peer.link.send(message)
