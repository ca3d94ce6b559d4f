"""Connections between the CPU processes of a run: one TCP socket for every pair of ranks.

A thread per connection takes in what arrives, so that a send never waits for the other rank to ask for it and two
ranks may send to each other at once. Messages of one channel keep their order; channels do not wait for one
another. Both ends of a connection prove that they belong to the run before anything else is read; what follows are
numbers of a known size, never objects. A rank that dies closes its sockets, which ends the wait of every rank that needs it at once.
"""

from __future__ import annotations

import os
import queue
import selectors
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from finetune.errors import RunError
from finetune.processes.network.handshake import introduce
from finetune.processes.network.listener import Listener, context_at, listen
from finetune.processes.network.secret import shared_key, withdraw_secret

_HEADER = struct.Struct("!qQ")  # channel, number of bytes
_LOOK_SECONDS = 0.2
_GONE = None


class PeerLostError(RunError, RuntimeError):
    """Another rank has ended, or cannot be reached any more."""


class Links:
    """The sockets of one process to all others.

    Args:
        rank: This process's global rank.
        endpoints: "address:port" of all ranks, as the launcher gave them.
        store: Paddle's default store, where the ranks tell each other their ports.
        timeout_seconds: Longest wait for a message.
        connect_seconds: Longest wait for a connection while they are made.
    """

    def __init__(
        self,
        rank: int,
        endpoints: Sequence[str],
        store: Any,
        *,
        timeout_seconds: float,
        connect_seconds: float,
    ):
        self.rank = rank
        self.world = len(endpoints)
        self._timeout_seconds = timeout_seconds
        self._sockets: dict[int, socket.socket] = {}
        # A message is sent in two pieces, and by the threads of several groups.
        self._sending: dict[int, threading.Lock] = {}
        self._inboxes: dict[tuple[int, int], queue.SimpleQueue[bytearray | None]] = defaultdict(
            queue.SimpleQueue
        )
        self._inboxes_lock = threading.Lock()
        self._gone: set[int] = set()
        self._connect(endpoints, store, connect_seconds)
        # A forked data worker would hold the sockets open after its parent's death, and so hide it.
        os.register_at_fork(after_in_child=self._close)
        for peer, connection in self._sockets.items():
            self._sending[peer] = threading.Lock()
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
            with self._sending[peer]:
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
            self._inbox(peer, channel).put(_GONE)  # for the next call: the rank has gone for good
            raise PeerLostError(f"rank {peer} ended while rank {self.rank} waited for it")
        if len(data) != num_bytes:
            raise RuntimeError(
                f"rank {self.rank} expected {num_bytes} bytes from rank {peer} and got {len(data)}: "
                "the ranks called different collectives, or with tensors of different shapes"
            )
        return data

    def _connect(self, endpoints: Sequence[str], store: Any, limit: float) -> None:
        """Connects to every lower rank and is connected to by every higher one."""
        deadline = time.monotonic() + limit
        key = shared_key(self.rank, endpoints, timeout_seconds=limit)
        hosts = [endpoint.rpartition(":")[0] for endpoint in endpoints]
        server = listen([(hosts[self.rank], 0)], spans_hosts=len(set(hosts)) > 1)
        # Nothing is told over the store, which everybody can read and write, but the port; that a port is the right
        # one shows in the handshake.
        store.set(f"links/{self.rank}", str(server.getsockname()[1]).encode())
        entrance = _Entrance(server, key, self.rank, self.world)
        entrance.start()
        try:
            for peer in range(self.rank):
                port = _parse_port(bytes(store.get(f"links/{peer}")), peer)
                self._sockets[peer] = _reach((hosts[peer], port), key, self.rank, peer, deadline)
            entrance.all_here.wait(max(deadline - time.monotonic(), 0))
        finally:
            entrance.stop()
        self._sockets |= entrance.admitted
        if missing := sorted(set(range(self.world)) - set(self._sockets) - {self.rank}):
            raise PeerLostError(f"ranks {missing} did not connect to rank {self.rank} in {limit:g} s")
        if self.rank == 0:
            withdraw_secret(endpoints)

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
        try:
            while (header := _read_exactly(connection, _HEADER.size)) is not None:
                channel, num_bytes = _HEADER.unpack(header)
                data = _read_exactly(connection, num_bytes)
                if data is None:
                    break
                self._inbox(peer, channel).put(data)
        except (OSError, MemoryError, OverflowError):  # the end of it, or a size that nothing of ours has
            connection.close()
        finally:
            with self._inboxes_lock:
                self._gone.add(peer)
                for (sender, _), inbox in self._inboxes.items():
                    if sender == peer:
                        inbox.put(_GONE)


class _Entrance(threading.Thread):
    """Lets in the higher ranks while this one connects to the lower ones."""

    def __init__(self, server: socket.socket, key: bytes, rank: int, world: int):
        super().__init__(daemon=True, name="link-entrance")
        self.admitted: dict[int, socket.socket] = {}
        self.all_here = threading.Event()
        self._expected = range(rank + 1, world)
        self._stopped = False
        self._selector = selectors.DefaultSelector()
        self._listener = Listener(server, key, _purpose(rank), selector=self._selector, admit=self._admit)

    def run(self) -> None:
        while not self._stopped and len(self.admitted) < len(self._expected):
            for ready, _ in self._selector.select(_LOOK_SECONDS):
                ready.data()
            self._listener.expire()
        self._listener.close()
        self._selector.close()
        self.all_here.set()

    def stop(self) -> None:
        """Ends listening."""
        self._stopped = True
        self.join()

    def _admit(self, rank: int, connection: socket.socket) -> bool:
        if rank not in self._expected:
            return False
        if (earlier := self.admitted.get(rank)) is not None:  # given up by the other side, which tries again
            earlier.close()
        self.admitted[rank] = connection
        return True


def _purpose(rank: int) -> str:
    return f"link to rank {rank}"


def _parse_port(told: bytes, peer: int) -> int:
    """The port that a rank has left in the store."""
    if not (told.isdigit() and len(told) < 6 and 0 < int(told) < 65536):
        raise PeerLostError(f"the store of the launch holds no port for rank {peer}, but {told[:40]!r}")
    return int(told)


def _reach(point: tuple[str, int], key: bytes, rank: int, peer: int, deadline: float) -> socket.socket:
    """A connection to a lower rank that has proved to be it."""
    reason = "it does not know the secret of this run"
    while (seconds := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(point, timeout=seconds)
        except OSError as error:
            reason = str(error)
        else:
            if introduce(connection, key, context_at(_purpose(peer), point[1]), rank):
                return connection
            connection.close()
        time.sleep(_LOOK_SECONDS)
    raise PeerLostError(f"rank {rank} cannot reach rank {peer} at {point[0]}:{point[1]}: {reason}")


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
