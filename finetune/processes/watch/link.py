"""Connections of the watch: JSON lines over TCP, and what the kernel says about the other end.

Whether a peer lives is asked of the kernels, not of the processes: the kernel of a killed process closes its
connection at once, the kernel of a busy or stopped process goes on answering keepalive probes, and an end that no
longer answers at all (power, cable, firewall) gives an error within `UNREACHABLE_SECONDS`. So nothing that a process
does, however long it computes, can look like its death.

A `Link` is made of a connection whose other end has proved that it belongs to the run; what comes in is limited in
length and depth all the same.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

PURPOSE = "watch"
UNREACHABLE_SECONDS = 20
SEND_SECONDS = 5
MAX_MESSAGE_BYTES = 1 << 20
MAX_MESSAGE_DEPTH = 6
_PROBE_SECONDS = 5

Message = dict[str, Any]


class Link:
    """One end of a connection.

    Attributes:
        fault: Why the connection ended, once `receive` has said that it did: "gone" when the other process ended,
            "unreachable" when its machine no longer answers, "garbled" when it sent something else than messages.
    """

    def __init__(self, connected: socket.socket):
        self.socket = connected
        self.fault = ""
        self._rest = b""
        connected.settimeout(SEND_SECONDS)  # for sending; what is read is there already
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Not every system has all of these; the rest then notices a cut later.
        for name, value in {
            "TCP_KEEPIDLE": _PROBE_SECONDS,
            "TCP_KEEPINTVL": _PROBE_SECONDS,
            "TCP_KEEPCNT": UNREACHABLE_SECONDS // _PROBE_SECONDS - 1,
            "TCP_USER_TIMEOUT": UNREACHABLE_SECONDS * 1000,
        }.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Message) -> None:
        """Sends a message; a dead connection shows up in `receive`, not here."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """The messages that have come in; None, with `fault` set, when the connection has ended.

        Call it when there is something to read.
        """
        try:
            data = self.socket.recv(1 << 16)
        except OSError as error:
            self.fault = "gone" if isinstance(error, ConnectionError) else "unreachable"
            return None
        if not data:
            self.fault = "gone"
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            if max(map(len, [*lines, self._rest])) > MAX_MESSAGE_BYTES:
                raise ValueError("too long")
            return [parse_message(line) for line in lines]
        except ValueError:
            self.fault = "garbled"
            return None

    def close(self) -> None:
        """Ends the connection after what was sent."""
        with suppress(OSError):
            self.socket.close()


def parse_message(line: bytes) -> Message:
    """A message of its line.

    Raises:
        ValueError: It is no JSON object, or nested deeper than `MAX_MESSAGE_DEPTH`.
    """
    try:
        message = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(message, dict) or _depth_of(message) > MAX_MESSAGE_DEPTH:
        raise ValueError("no message of the watch")
    return message


def _depth_of(value: Any) -> int:
    """How deep lists and objects are nested; looks no deeper than needed to say too deep."""
    depth, level = 0, [value]
    while level and depth <= MAX_MESSAGE_DEPTH:
        parts = [
            each.values() if isinstance(each, dict) else each
            for each in level
            if isinstance(each, dict | list)
        ]
        depth, level = depth + bool(parts), [item for part in parts for item in part]
    return depth


def meeting_points(environment: Mapping[str, str] = os.environ) -> list[tuple[str, int]]:
    """Addresses where rank 0 may listen, first choice first; the same list on every rank.

    The launcher picked a free port for every process, and nothing but its store (PADDLE_MASTER) uses any of them.
    The first process's own comes first; those of its neighbours on the same machine stand in should another program
    have taken it meanwhile.
    """
    endpoints = environment["PADDLE_TRAINER_ENDPOINTS"].split(",")
    address = endpoints[0].rpartition(":")[0]
    store = environment.get("PADDLE_MASTER", "")
    own = [one for one in endpoints if one.rpartition(":")[0] == address and one != store]
    return [(address, int(one.rpartition(":")[2])) for one in own] or [
        (address, int(endpoints[0].rpartition(":")[2]) + 1)
    ]
