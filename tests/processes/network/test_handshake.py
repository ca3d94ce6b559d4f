"""The listener on loopback: who gets in, who does not, and what strangers cost."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from finetune.processes.network import handshake, listener
from finetune.processes.network.handshake import HELLO_BYTES, Challenge, introduce
from finetune.processes.network.listener import MAX_UNPROVEN, Listener, context_at, listen
from tests.conftest import ROOT

KEY = b"k" * 32
DEEP_LINE = b'{"token": ' + b"[" * 100_000 + b"\n"


class Entrance:
    """A listener in a thread, and whom it has let in."""

    def __init__(self) -> None:
        self.admitted: dict[int, socket.socket] = {}
        self.server = listen([("127.0.0.1", 0)], spans_hosts=False)
        self.port = self.server.getsockname()[1]
        self.selector = selectors.DefaultSelector()
        self.listener = Listener(self.server, KEY, "test", selector=self.selector, admit=self._admit)
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _admit(self, rank: int, connection: socket.socket) -> bool:
        self.admitted[rank] = connection
        return rank != 7

    def _run(self) -> None:
        while not self._ended:
            for ready, _ in self.selector.select(0.02):
                ready.data()
            self.listener.expire()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def introduces(self, rank: int = 1, key: bytes = KEY, context: str | None = None) -> bool:
        with self.connect() as connection:
            return introduce(connection, key, context or context_at("test", self.port), rank)

    def ranks(self, *expected: int) -> bool:
        """Whether these ranks, and no others, have been let in; what was proved is handed on a moment later."""
        end = time.monotonic() + 2
        while list(self.admitted) != [*expected] and time.monotonic() < end:
            time.sleep(0.01)
        return list(self.admitted) == [*expected]

    def end(self) -> None:
        self._ended = True
        self._thread.join()
        self.listener.close()


@pytest.fixture
def entrance() -> Iterator[Entrance]:
    opened = Entrance()
    yield opened
    opened.end()


def ended(connection: socket.socket) -> bool:
    """Whether the other side closes, whatever it had said."""
    connection.settimeout(5)
    try:
        while connection.recv(1000):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def test_the_same_key_is_proved_on_both_sides(entrance: Entrance):
    assert entrance.introduces(3)
    assert entrance.ranks(3)
    assert entrance.introduces(7), "proved, though it is not wanted"


@pytest.mark.parametrize(
    ("key", "context"), [(b"x" * 32, None), (b"", None), (KEY, "test at port 1"), (KEY, "link at port 1")]
)
def test_another_key_port_or_purpose_is_refused(entrance: Entrance, key, context):
    assert not entrance.introduces(1, key, context)
    assert not entrance.admitted and entrance.listener.num_refused == 1
    assert entrance.introduces(1)


def test_what_was_overheard_opens_nothing(entrance: Entrance):
    """A whole handshake recorded, then its connector's part sent again."""
    with entrance.connect() as first:
        greeting = first.recv(1000)
        recorder = Recorder(greeting)
        assert not introduce(recorder, KEY, context_at("test", entrance.port), 1)
        first.sendall(recorder.sent)
        assert len(first.recv(1000)) == 32, "the recorded hello was good"
    assert entrance.ranks(1)
    entrance.admitted.clear()
    with entrance.connect() as second:
        assert second.recv(1000) != greeting
        second.sendall(recorder.sent)
        assert ended(second)
    assert not entrance.admitted and entrance.listener.num_refused == 1


class Recorder:
    """A connection that gives one greeting and keeps what is sent."""

    def __init__(self, greeting: bytes):
        self._greeting = greeting
        self.sent = b""

    def settimeout(self, _: float) -> None:
        pass

    def recv(self, _: int) -> bytes:
        part, self._greeting = self._greeting, b""
        return part

    def sendall(self, data: bytes) -> None:
        self.sent += data


def test_a_proof_cannot_be_sent_back_to_its_maker():
    """The acceptor's answer is no hello, and the other way round."""
    challenge = Challenge(KEY, "test at port 1")
    recorder = Recorder(challenge.greeting)
    introduce(recorder, KEY, "test at port 1", 1)
    proved = challenge.check(recorder.sent)
    assert proved is not None
    rank, answer = proved
    assert rank == 1 and answer != recorder.sent[-32:]
    assert challenge.check(recorder.sent[:-32] + answer) is None
    other_rank = (2).to_bytes(4, "big") + recorder.sent[4:]
    assert challenge.check(other_rank) is None


@pytest.mark.parametrize(
    "data",
    [DEEP_LINE, b"x" * 3_000_000, os.urandom(HELLO_BYTES), os.urandom(5000), b"\0" * HELLO_BYTES, b"GET / HTTP/1.1\r\n\r\n" * 10],
    ids=["deep line", "endless line", "garbage of the right length", "garbage", "zeros", "a browser"],
)  # fmt: skip
def test_anything_else_is_closed(entrance: Entrance, data):
    with entrance.connect() as stranger:
        with suppress(ConnectionError):
            stranger.sendall(data)
        assert ended(stranger)
    assert entrance.introduces(1), "the entrance is still open"


def test_silence_and_half_a_hello_have_their_time(entrance: Entrance, monkeypatch):
    monkeypatch.setattr(listener, "HANDSHAKE_SECONDS", 0.3)
    with entrance.connect() as silent, entrance.connect() as slow, entrance.connect() as gone:
        slow.sendall(b"half")
        gone.close()
        began = time.monotonic()
        assert ended(silent) and ended(slow)
        assert time.monotonic() - began < 3
    assert entrance.introduces(1)


def test_a_server_that_says_nothing_or_nonsense_is_given_up(monkeypatch):
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for greeting in (b"", b"SSH-2.0-OpenSSH\r\n" * 10, b"FINETUNE" + os.urandom(31)):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                other, _ = server.accept()
                other.sendall(greeting)
                began = time.monotonic()
                assert not introduce(connection, KEY, "test", 1)
                assert time.monotonic() - began < 2
                other.close()


FLOOD = """
import resource, socket, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sys.path.insert(0, ".")
from tests.processes.network.test_handshake import Entrance, MAX_UNPROVEN
from finetune.processes.network.listener import allow_open_files
if RAISE: allow_open_files(2500)
entrance = Entrance()
silent = []
for number in range(NUM):
    try:
        silent.append(entrance.connect())
    except OSError:
        break
    if number % 50 == 0 and not entrance.introduces(number):
        print("kept out after", number)
for one in silent[-20:]:
    one.close()
print("number", len(silent), "unproven", len(entrance.listener.sockets()) - 1 <= MAX_UNPROVEN)
print("let in", entrance.introduces(1))
entrance.end()
"""


@pytest.mark.parametrize(("soft", "raised", "num"), [(1024, True, 1100), (120, False, 300)])
def test_connections_that_say_nothing_do_not_keep_ranks_out(soft, raised, num):
    """More than a select could hold, and more than there are descriptors: both ends in one process."""
    source = FLOOD.replace("SOFT", str(soft)).replace("RAISE", str(raised)).replace("NUM", str(num))
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "kept out" not in done.stdout and "unproven True" in done.stdout
    assert done.stdout.endswith("let in True\n")
    if raised:
        assert "number 1100" in done.stdout


def test_a_listener_stands_at_one_interface_unless_others_must_come_in():
    with listen([("127.0.0.1", 0)], spans_hosts=False) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with listen([("127.0.0.1", 0)], spans_hosts=True) as server:
        assert server.getsockname()[0] == "0.0.0.0"
    with listen([("203.0.113.7", 0)], spans_hosts=True) as server:  # an address of no machine (RFC 5737)
        assert server.getsockname()[0] == "0.0.0.0"
    with listen([("127.0.0.1", 0)], spans_hosts=False) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=r"cannot listen at any of \[\('127.0.0.1'"):
            listen([("127.0.0.1", port)], spans_hosts=False)
    assert MAX_UNPROVEN < 1000
