"""The watch of every rank but the first: one connection to rank 0."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from finetune.processes.deadline import end_at_latest
from finetune.processes.network.handshake import HANDSHAKE_SECONDS, introduce
from finetune.processes.network.listener import context_at
from finetune.processes.network.secret import VARIABLE
from finetune.processes.watch.link import PURPOSE, SEND_SECONDS, UNREACHABLE_SECONDS, Link, Message
from finetune.processes.watch.report import Place, show_message, tail_of
from finetune.processes.watch.thread import PeersUnreachable, WatchThread

_CONNECT_SECONDS = 3
_END_SECONDS = 15.0


class Member(WatchThread):
    """Watches rank 0, and does what it says."""

    link: Any = None
    hub: Place
    hub_phase = "start"
    _has_secret = True
    _found_other: tuple[str, int] | None = None

    def connect(self, deadline: float) -> None:
        """Finds rank 0 and waits until it has found all others."""
        seconds = deadline - time.monotonic()
        if not self._find_hub(deadline):
            raise PeersUnreachable(self._why_alone())
        self.start()
        # Rank 0 names who is missing, when its own deadline passes.
        if not self.wait_for_all(time.monotonic() + seconds + UNREACHABLE_SECONDS):
            raise PeersUnreachable(f"{self.hub} did not say whether all ranks are there")

    def _find_hub(self, deadline: float) -> bool:
        while time.monotonic() < deadline:
            key = self.secret.look_up()
            self._has_secret = key is not None
            for point in self.points:
                if key is not None and self._introduce(point, key):
                    self.secret.remember(key)
                    if not self.closed:  # rank 0 may have come and gone by now
                        self.selector.register(self.link.socket, selectors.EVENT_READ, self._read)
                    return True
            self.check_siblings()
            time.sleep(0.2)
        return False

    def _introduce(self, point: tuple[str, int], key: bytes) -> bool:
        """Whether rank 0 of our launch is there, and knows us now."""
        try:
            connection = socket.create_connection(point, timeout=_CONNECT_SECONDS)
        except OSError:
            return False
        if not introduce(connection, key, context_at(PURPOSE, point[1]), self.place.rank):
            self._found_other = point
            connection.close()
            return False
        link = Link(connection)
        link.send({"hello": asdict(self.place)})
        link.socket.settimeout(HANDSHAKE_SECONDS)
        while (answer := link.receive()) == []:
            pass
        link.socket.settimeout(SEND_SECONDS)
        hello = next((message for message in answer or [] if "hello" in message), None)
        if hello is None:
            link.close()
            return False
        self.link, self.hub = link, Place(**hello["hello"])
        for message in answer or []:
            self._take(message)  # of the hello nothing more
        return True

    def _why_alone(self) -> str:
        address = self.points[0][0]
        ports = "port " + " and ".join(str(port) for _, port in self.points)
        text = (
            f"rank 0 on host {address} cannot be reached from {self.place} (tried {ports}): check that "
            f"its process started (see the launcher's log there), that {address} is an address of it that this "
            "host can reach (--host sets it), and that no firewall is between them."
        )
        if not self._has_secret:
            text += (
                f" It has left no secret at {self.secret.where()}: where it runs, that folder must be the same there and "
                f"here, or {VARIABLE} be set to the same text for all."
            )
        elif self._found_other:
            text += (
                f" Something that does not know this run's secret listens at port {self._found_other[1]}: where that "
                f"is rank 0, {self.secret.where()} is not the same there and here."
            )
        return text

    def sockets(self) -> list[Any]:
        """The link to rank 0."""
        return [self.link] if self.link else []

    def _read(self) -> None:
        """Takes rank 0's messages, or its end."""
        messages = self.link.receive()
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
            show_message(message.get("lines", []))
            self.closed = True
            self.ended.set()
            self.link.close()
        elif "end" in message:
            end_at_latest(_END_SECONDS)
            show_message(message["lines"])
            for place in message["tails"].get(str(self.place.rank), []):
                show_message(tail_of(Place(**place)))
            self.end(message["end"])

    def _lose_hub(self) -> None:
        end_at_latest(_END_SECONDS)
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

    def goodbye(self, lines: Sequence[str] = ()) -> None:
        """Tells rank 0 that this rank is done."""
        self.link.send({"bye": True})
        self.link.close()

    def note_failure(self, text: str, code: int) -> None:
        """Tells rank 0, which tells the others."""
        self.link.send({"failed": text, "code": code})
