"""Connections of the watch: JSON lines over TCP, and what the kernel says about the other end.

Whether a peer lives is asked of the kernels, not of the processes: the kernel of a killed process closes its
connection at once, the kernel of a busy or stopped process goes on answering keepalive probes, and an end that no
longer answers at all (power, cable, firewall) gives an error within `UNREACHABLE_SECONDS`. So nothing that a process
does, however long it computes, can look like its death.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

UNREACHABLE_SECONDS = 20
SEND_SECONDS = 5
_PROBE_SECONDS = 5
_LARGEST_MESSAGE = 1 << 20

Message = dict[str, Any]


class Link:
    """One end of a connection.

    Attributes:
        fault: Why the connection ended, once `receive` has said that it did: "gone" when the other process ended,
            "unreachable" when its machine no longer answers.
    """

    def __init__(self, connected: socket.socket):
        self.socket = connected
        self.fault = ""
        self._rest = b""
        connected.settimeout(SEND_SECONDS)  # for sending; reading waits in select
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

    def fileno(self) -> int:
        """For select."""
        return self.socket.fileno()

    def send(self, message: Message) -> None:
        """Sends a message; a dead connection shows up in `receive`, not here."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """The messages that have come in; None, with `fault` set, when the connection has ended.

        Call it when select says that there is something to read.
        """
        try:
            data = self.socket.recv(1 << 16)
        except (ConnectionError, TimeoutError, OSError) as error:
            self.fault = "gone" if isinstance(error, ConnectionError) else "unreachable"
            return None
        if not data or len(self._rest) > _LARGEST_MESSAGE:
            self.fault = "gone"
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:  # something else than our program has called
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):
            self.fault = "gone"
            return None
        return messages

    def close(self) -> None:
        """Ends the connection after what was sent."""
        with suppress(OSError):
            self.socket.close()


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


def listen(points: list[tuple[str, int]]) -> socket.socket:
    """Listens at the first address that is free.

    Raises:
        OSError: None is.
    """
    error: OSError | None = None
    # An address that only others know this machine by (a container's host) cannot be listened at: all of ours then.
    for address, port in [*points, *(("", port) for _, port in points)]:
        try:
            return socket.create_server((address, port), backlog=1024)
        except OSError as fault:
            error = fault
    raise OSError(f"rank 0 cannot listen at any of {points}: {error}")


def connect(point: tuple[str, int], timeout: float) -> Link | None:
    """A connection to rank 0, or None where it is not listening (yet)."""
    try:
        return Link(socket.create_connection(point, timeout=timeout))
    except OSError:
        return None
