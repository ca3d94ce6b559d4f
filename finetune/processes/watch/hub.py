"""The watch of rank 0: a connection to every other rank, and the decision when a run is over."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from finetune.processes.watch.link import Link, Message, listen
from finetune.processes.watch.member import token_of
from finetune.processes.watch.report import Place, RankState, phase_table, show_message, tail_of
from finetune.processes.watch.thread import BEAT_SECONDS, PeersUnreachable, WatchThread

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
        is_done: It said goodbye.
        has_failed: It said that it ends with an error, or it died.
    """

    place: Place
    link: Link | None = None
    phase: str = "not connected"
    phase_since: float = 0.0
    heard: float = 0.0
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
        self._strangers: list[Link] = []
        self._server: Any = None
        self._deaths: list[str] = []
        self._failures: list[str] = []
        self._own_failure: str | None = None
        self._codes: list[int] = []
        self._end_at: float | None = None
        self._hang_told = time.monotonic()

    # ---------------------------------------------------------------- called by the main thread

    def connect(self, deadline: float) -> None:
        """Waits for the others."""
        self._server = listen(self.points)
        self.start()
        if self.all_here.wait(max(deadline - time.monotonic(), 0)):
            return
        with self.lock:
            text = self._missing()
            self._tell({"end": 1, "lines": [f"error: {text}"], "tails": {}})
            self.close()
        raise PeersUnreachable(text)

    def _missing(self) -> str:
        missing = [peer for peer in self.peers.values() if peer.link is None]
        machines: dict[str, list[int]] = {}
        for peer in missing:
            machines.setdefault(peer.place.machine, []).append(peer.place.rank)
        named = "; ".join(
            f"{machine}: rank {', '.join(map(str, ranks))}" for machine, ranks in machines.items()
        )
        return (
            f"{len(missing)} of {len(self.endpoints)} ranks did not connect to rank 0 at "
            f"{self.points[0][0]} ({named}): check that they started (see the launcher's log there), that those "
            "hosts can reach this address (--host sets it), and that no firewall is between them."
        )

    def goodbye(self) -> None:
        """Lets the other ranks finish unwatched."""
        self._tell({"bye": True})
        for one in self.sockets():
            one.close()

    def note_failure(self, text: str, code: int) -> None:
        """Has all ranks end, those with troubles of their own first."""
        self._own_failure = text
        self._expect_end(code)

    # ---------------------------------------------------------------- the thread

    def sockets(self) -> list[Any]:
        """All links and the listening socket."""
        links = [peer.link for peer in self.peers.values() if peer.link]
        return [*([self._server] if self._server else []), *links, *self._strangers]

    def read(self, ready: Any) -> None:
        """Takes a new connection, or messages."""
        if ready is self._server:
            with suppress(OSError):
                self._strangers.append(Link(self._server.accept()[0]))
            return
        messages = ready.receive()
        if ready in self._strangers:
            self._strangers.remove(ready)
            if not self._welcome(ready, messages or []):
                ready.close()
            return
        peer = next(peer for peer in self.peers.values() if peer.link is ready)
        for message in messages or []:
            self._take(peer, message)
        if messages is None:
            self._lose(peer, ready)

    def _welcome(self, link: Link, messages: list[Message]) -> bool:
        if not messages or messages[0].get("token") != token_of(self.endpoints):
            return False
        place = Place(**messages[0]["hello"])
        peer = self.peers.get(place.rank)
        if peer is None or peer.link is not None:
            return False
        peer.place, peer.link, peer.phase = place, link, "start"
        peer.heard = peer.phase_since = time.monotonic()
        link.send({"hello": asdict(self.place), "token": token_of(self.endpoints)})
        if all(other.link for other in self.peers.values()):
            self._tell({"all_here": True})
            self._hang_told = time.monotonic()
            self.all_here.set()
        return True

    def _take(self, peer: Peer, message: Message) -> None:
        peer.heard = time.monotonic()
        if "phase" in message:
            peer.phase, peer.phase_since = message["phase"], peer.heard - message["seconds"]
        elif "bye" in message:
            peer.is_done, peer.phase = True, "finished"
        elif "failed" in message:
            peer.has_failed, peer.phase = True, "failed"
            self._failures.append(f"{peer.place} failed: {message['failed']}")
            self._expect_end(message["code"])

    def _lose(self, peer: Peer, link: Link) -> None:
        link.close()
        peer.link = None
        if peer.is_done or peer.has_failed:
            return
        peer.has_failed = True
        how = (
            "is gone (killed or crashed" if link.fault == "gone" else "cannot be reached any more (no answer"
        )
        line = f"error: {peer.place} {how}; last phase: {peer.phase}); all processes of the run end"
        show_message([line])
        self._deaths.append(line)
        self._expect_end(1)

    def _expect_end(self, code: int) -> None:
        self._codes.append(code)
        end_at = time.monotonic() + _GRACE_SECONDS[min(max(code, 1), 2)]
        self._end_at = end_at if self._end_at is None else min(self._end_at, end_at)

    def look(self) -> None:
        """Ends the run when it is time, or says that it hangs."""
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
            if peer.link and now - peer.heard < 5 * BEAT_SECONDS:
                peer.link.send(message)

    def _tell(self, message: Message) -> None:
        for peer in self.peers.values():
            if peer.link:
                peer.link.send(message)
