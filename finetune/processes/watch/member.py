"""The watch of every rank but the first: one connection to rank 0."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from typing import Any

from finetune.processes.watch.link import SEND_SECONDS, UNREACHABLE_SECONDS, Link, Message, connect
from finetune.processes.watch.report import Place, show_message, tail_of
from finetune.processes.watch.thread import PeersUnreachable, WatchThread

_INTRODUCTION_SECONDS = 30


def token_of(endpoints: list[str]) -> str:
    """What the processes of one launch know in common, so that two runs never mix."""
    return hashlib.sha256(",".join(endpoints).encode()).hexdigest()[:16]


class Member(WatchThread):
    """Watches rank 0, and does what it says."""

    link: Any = None
    hub: Place
    hub_phase = "start"

    def connect(self, deadline: float) -> None:
        """Finds rank 0 and waits until it has found all others."""
        seconds = deadline - time.monotonic()
        hub = self._find_hub(deadline)
        if hub is None:
            address = self.points[0][0]
            raise PeersUnreachable(
                f"rank 0 on host {address} cannot be reached from {self.place} (tried {self._ports()}): check that "
                f"its process started (see the launcher's log there), that {address} is an address of it that this "
                "host can reach (--host sets it), and that no firewall is between them."
            )
        self.start()
        # Rank 0 names who is missing, when its own deadline passes.
        if not self.all_here.wait(seconds + UNREACHABLE_SECONDS):
            raise PeersUnreachable(f"{self.hub} did not say whether all ranks are there")

    def _find_hub(self, deadline: float) -> Place | None:
        while time.monotonic() < deadline:
            for point in self.points:
                link = connect(point, timeout=3)
                if link and self._introduce(link):
                    return self.hub
            time.sleep(0.2)
        return None

    def _introduce(self, link: Link) -> bool:
        """Tells rank 0 who we are; whether it is the rank 0 of our launch that answered."""
        link.send({"hello": asdict(self.place), "token": token_of(self.endpoints)})
        link.socket.settimeout(_INTRODUCTION_SECONDS)
        answer = link.receive()
        link.socket.settimeout(SEND_SECONDS)
        if not answer or answer[0].get("token") != token_of(self.endpoints):
            link.close()
            return False
        self.link, self.hub = link, Place(**answer[0]["hello"])
        for message in answer[1:]:
            self._take(message)
        return True

    def _ports(self) -> str:
        return "port " + " and ".join(str(port) for _, port in self.points)

    def sockets(self) -> list[Any]:
        """The link to rank 0."""
        return [self.link] if self.link else []

    def read(self, ready: Link) -> None:
        """Takes rank 0's messages, or its end."""
        messages = ready.receive()
        if messages is None:
            self._lose_hub()
        for message in messages or []:
            self._take(message)

    def _take(self, message: Message) -> None:
        if "all_here" in message:
            self.all_here.set()
        elif "phase" in message:
            self.hub_phase = message["phase"]
        elif "hang" in message:
            self.show_stacks()
        elif "bye" in message:  # rank 0 is done; what is left to do here is left to the launcher to watch
            self.closed = True
            self.ended.set()
            self.link.close()
        elif "end" in message:
            show_message(message["lines"])
            for place in message["tails"].get(str(self.place.rank), []):
                show_message(tail_of(Place(**place)))
            self.end(message["end"])

    def _lose_hub(self) -> None:
        how = "is gone" if self.link.fault == "gone" else "cannot be reached any more"
        show_message([f"error: {self.hub} {how} (last phase: {self.hub_phase}); this process ends too"])
        if self.hub.machine == self.place.machine and self._is_second_of_machine():
            show_message(tail_of(self.hub))
        self.end(1)

    def _is_second_of_machine(self) -> bool:
        address = self.points[0][0]
        neighbours = [rank for rank, one in enumerate(self.endpoints) if one.rpartition(":")[0] == address]
        return neighbours[1:2] == [self.place.rank]

    def look(self) -> None:
        """Nothing: it is rank 0 that keeps time."""

    def beat(self, message: Message) -> None:
        """Tells rank 0 what this process does."""
        self.link.send(message)

    def goodbye(self) -> None:
        """Tells rank 0 that this rank is done."""
        self.link.send({"bye": True})
        self.link.close()

    def note_failure(self, text: str, code: int) -> None:
        """Tells rank 0, which tells the others."""
        self.link.send({"failed": text, "code": code})
