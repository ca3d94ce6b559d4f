"""A listening socket that lets in the processes of the run and keeps everybody else at a fixed price.

A connection that has not proved itself may hold one socket, 68 bytes and `HANDSHAKE_SECONDS`; of `MAX_UNPROVEN` such
connections the oldest is closed for each new one, so that connections that say nothing cannot keep others out.
"""

from __future__ import annotations

import errno
import ipaddress
import resource
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from finetune.processes.network.handshake import HANDSHAKE_SECONDS, HELLO_BYTES, Challenge

MAX_UNPROVEN = 256
_BACKLOG = 1024
_AT_ONCE = 64
_NO_DESCRIPTOR_PAUSE = 0.05

Admit = Callable[[int, socket.socket], bool]


@dataclass
class _Unproven:
    """A connection in its handshake."""

    challenge: Challenge
    since: float
    received: bytes = b""


class Listener:
    """Accepts connections and hands on those that know the key; driven by a selector whose data are callables.

    Args:
        server: Listens already.
        key: Of the run.
        purpose: What connections are for; the port is added to it (`context_at`).
        selector: Whoever selects calls `key.data()` of what is ready.
        admit: Told the rank and the connection of each process that has proved itself; whether it is wanted. A
            connection that is not is closed.

    Attributes:
        num_refused: Connections that spoke our protocol with another key.
    """

    def __init__(
        self,
        server: socket.socket,
        key: bytes,
        purpose: str,
        *,
        selector: selectors.BaseSelector,
        admit: Admit,
    ):
        self.server = server
        self.num_refused = 0
        self._key = key
        self._context = context_at(purpose, server.getsockname()[1])
        self._selector = selector
        self._admit = admit
        self._unproven: dict[socket.socket, _Unproven] = {}
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ, self._accept)

    def expire(self) -> None:
        """Closes connections whose time for the handshake is over; call it at least every second."""
        now = time.monotonic()
        for connection, state in list(self._unproven.items()):
            if now - state.since < HANDSHAKE_SECONDS:
                break  # in the order in which they came
            self._drop(connection)

    def close(self) -> None:
        """Ends listening; what was admitted stays connected."""
        for connection in list(self._unproven):
            self._drop(connection)
        with suppress(KeyError, ValueError):
            self._selector.unregister(self.server)
        self.server.close()

    def sockets(self) -> list[socket.socket]:
        """What is open here, for a forked child to close its copies."""
        return [self.server, *self._unproven]

    def _accept(self) -> None:
        if self.server.fileno() < 0:  # closed in the same round
            return
        for _ in range(_AT_ONCE):
            try:
                connection, _ = self.server.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor is left: give one back, and others time to end theirs
                if self._unproven:
                    self._drop(next(iter(self._unproven)))
                time.sleep(_NO_DESCRIPTOR_PAUSE)
                return
            if len(self._unproven) >= MAX_UNPROVEN:
                self._drop(next(iter(self._unproven)))
            self._greet(connection)

    def _greet(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        state = _Unproven(Challenge(self._key, self._context), time.monotonic())
        try:
            connection.send(state.challenge.greeting)  # fits into the empty buffer of a new connection
        except OSError:
            connection.close()
            return
        self._unproven[connection] = state
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(connection))

    def _read(self, connection: socket.socket) -> None:
        state = self._unproven.get(connection)
        if state is None:  # dropped in the same round
            return
        try:
            part = connection.recv(HELLO_BYTES - len(state.received))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        state.received += part
        if not part:
            self._drop(connection)
        elif len(state.received) == HELLO_BYTES:
            self._decide(connection, state)

    def _decide(self, connection: socket.socket, state: _Unproven) -> None:
        proved = state.challenge.check(state.received)
        if proved is None:
            self.num_refused += 1
            self._drop(connection)
            return
        rank, answer = proved
        self._selector.unregister(connection)
        del self._unproven[connection]
        try:
            connection.send(answer)
            wanted = self._admit(rank, connection)
        except OSError:
            wanted = False
        if not wanted:
            connection.close()

    def _drop(self, connection: socket.socket) -> None:
        del self._unproven[connection]
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection)
        connection.close()


def listen(points: Sequence[tuple[str, int]], *, spans_hosts: bool) -> socket.socket:
    """Listens at the first address that is free, which belongs to one interface of this machine.

    It is all interfaces where the address is none of this machine's own (others know a container by its host's), or
    where its name means this machine itself here (as /etc/hosts of some systems has it) and other hosts must come in.

    Args:
        points: Addresses and ports, first choice first.
        spans_hosts: Whether other hosts must be able to connect.

    Raises:
        OSError: None is free.
    """
    error: OSError | None = None
    for address, port in points:
        try:
            server = socket.create_server((address, port), backlog=_BACKLOG)
        except OSError as fault:
            error = fault
            continue
        if not (spans_hosts and ipaddress.ip_address(server.getsockname()[0]).is_loopback):
            return server
        server.close()
    if error is None or error.errno not in (errno.EADDRINUSE, errno.EACCES):
        for _, port in points:
            try:
                return socket.create_server(("", port), backlog=_BACKLOG)
            except OSError as fault:
                error = fault
    raise OSError(f"cannot listen at any of {points}: {error}")


def context_at(purpose: str, port: int) -> str:
    """The context of handshakes with a listener."""
    return f"{purpose} at port {port}"


def allow_open_files(num_files: int) -> None:
    """Lets this process have that many files and sockets open, where the system's hard limit allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_files if hard == resource.RLIM_INFINITY else min(num_files, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
