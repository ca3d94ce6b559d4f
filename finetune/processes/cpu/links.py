"""Connections between the CPU processes of a run: one TCP socket for every pair of ranks.

A thread per connection takes in what arrives, so that a send never waits for the other rank to ask for it and two
ranks may send to each other at once. Messages of one channel keep their order; channels do not wait for one
another. A rank that dies closes its sockets, which ends the wait of every rank that needs it at once.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import struct
import threading
from collections import defaultdict
from typing import Any

_HEADER = struct.Struct("!qQ")  # channel, number of bytes
_HELLO = struct.Struct("!q16s")  # rank, token
_GONE = None


class PeerLostError(RuntimeError):
    """Another rank has ended, or cannot be reached any more."""


class Links:
    """The sockets of one process to all others.

    Args:
        rank: This process's global rank.
        world: Number of ranks.
        host: Address of this machine, as the others know it.
        store: Paddle's default store, where the ranks tell each other their ports.
        timeout_seconds: Longest wait for a message.
        connect_seconds: Longest wait for a connection while they are made.
    """

    def __init__(
        self, rank: int, world: int, host: str, store: Any, *, timeout_seconds: float, connect_seconds: float
    ):
        self.rank = rank
        self.world = world
        self._timeout_seconds = timeout_seconds
        self._sockets: dict[int, socket.socket] = {}
        self._inboxes: dict[tuple[int, int], queue.SimpleQueue[bytearray | None]] = defaultdict(
            queue.SimpleQueue
        )
        self._inboxes_lock = threading.Lock()
        self._gone: set[int] = set()
        self._connect(host, store, connect_seconds)
        # A forked data worker would hold the sockets open after its parent's death, and so hide it.
        os.register_at_fork(after_in_child=self._close)
        for peer, connection in self._sockets.items():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.settimeout(None)
            reader = threading.Thread(
                target=self._read, args=(peer, connection), daemon=True, name=f"link-{peer}"
            )
            reader.start()

    def send(self, peer: int, channel: int, data: memoryview) -> None:
        """Sends bytes to a rank; they may be changed as soon as this returns.

        Raises:
            PeerLostError: The rank has gone.
        """
        connection = self._sockets[peer]
        try:
            connection.sendall(_HEADER.pack(channel, data.nbytes))
            connection.sendall(data)
        except OSError as error:
            raise PeerLostError(f"rank {self.rank} lost rank {peer} while sending: {error}") from error

    def receive(self, peer: int, channel: int, num_bytes: int) -> bytearray:
        """The next message of a rank on a channel.

        Raises:
            PeerLostError: The rank has gone, or sent nothing for the time limit.
            RuntimeError: The message has another size: the ranks do not run the same calls.
        """
        try:
            data = self._inbox(peer, channel).get(timeout=self._timeout_seconds)
        except queue.Empty:
            raise PeerLostError(
                f"rank {self.rank} waited {self._timeout_seconds:g} s for rank {peer}, which sent nothing"
            ) from None
        if data is _GONE:
            raise PeerLostError(f"rank {peer} ended while rank {self.rank} waited for it")
        if len(data) != num_bytes:
            raise RuntimeError(
                f"rank {self.rank} expected {num_bytes} bytes from rank {peer} and got {len(data)}: "
                "the ranks called different collectives, or with tensors of different shapes"
            )
        return data

    def _connect(self, host: str, store: Any, limit: float) -> None:
        """Connects to every lower rank and is connected to by every higher one."""
        token = secrets.token_bytes(16)  # keeps strangers on the network from posing as a rank
        with socket.create_server(("", 0), backlog=self.world) as server:
            server.settimeout(limit)
            port = server.getsockname()[1]
            store.set(f"links/{self.rank}", f"{host} {port} {token.hex()}".encode())
            for peer in range(self.rank):
                peer_host, peer_port, peer_token = bytes(store.get(f"links/{peer}")).decode().split()
                try:
                    connection = socket.create_connection((peer_host, int(peer_port)), timeout=limit)
                except OSError as error:
                    raise PeerLostError(
                        f"rank {self.rank} ({host}) cannot reach rank {peer} at {peer_host}:{peer_port}: {error}"
                    ) from error
                connection.sendall(_HELLO.pack(self.rank, bytes.fromhex(peer_token)))
                self._sockets[peer] = connection
            while len(self._sockets) < self.world - 1:
                self._accept(server, token, limit)

    def _accept(self, server: socket.socket, token: bytes, limit: float) -> None:
        """Takes one connection; one that does not know the token is closed again."""
        try:
            connection, _ = server.accept()
        except TimeoutError:
            missing = sorted(set(range(self.world)) - set(self._sockets) - {self.rank})
            raise PeerLostError(
                f"ranks {missing} did not connect to rank {self.rank} in {limit:g} s"
            ) from None
        connection.settimeout(limit)
        with contextlib.suppress(OSError):
            hello = _read_exactly(connection, _HELLO.size)
            if hello is not None:
                peer, claimed = _HELLO.unpack(hello)
                if secrets.compare_digest(claimed, token) and self.rank < peer < self.world:
                    self._sockets[peer] = connection
                    return
        connection.close()

    def _close(self) -> None:
        """Closes this process's end of the sockets, without a word to the other ends."""
        for connection in self._sockets.values():
            connection.close()

    def _inbox(self, peer: int, channel: int) -> queue.SimpleQueue[bytearray | None]:
        with self._inboxes_lock:
            known = (peer, channel) in self._inboxes
            inbox = self._inboxes[peer, channel]
            if not known and peer in self._gone:
                inbox.put(_GONE)
            return inbox

    def _read(self, peer: int, connection: socket.socket) -> None:
        """Sorts everything that a rank sends into the inboxes, until it ends."""
        with contextlib.suppress(OSError):
            while (header := _read_exactly(connection, _HEADER.size)) is not None:
                channel, num_bytes = _HEADER.unpack(header)
                data = _read_exactly(connection, num_bytes)
                if data is None:
                    break
                self._inbox(peer, channel).put(data)
        with self._inboxes_lock:
            self._gone.add(peer)
            for (sender, _), inbox in self._inboxes.items():
                if sender == peer:
                    inbox.put(_GONE)


def _read_exactly(connection: socket.socket, num_bytes: int) -> bytearray | None:
    """That many bytes; None where the other side closed first."""
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            return None
        view = view[count:]
    return data
