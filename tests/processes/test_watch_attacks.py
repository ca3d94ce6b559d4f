"""Strangers at the watch while ranks connect and run: they get nothing, and the ranks live on."""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict

from finetune.processes.network.handshake import HELLO_BYTES, introduce
from finetune.processes.network.listener import allow_open_files, context_at
from finetune.processes.network.secret import JobSecret
from finetune.processes.watch.report import Place
from tests.processes.test_watch import LOOP, Ranks, ranks  # noqa: F401  (a fixture)

LATE = "import time, os\nif os.environ['PADDLE_TRAINER_ID'] == '2': time.sleep(4)\n"


def flood(port: int) -> list[socket.socket]:
    """Everything at once: a deep line, an endless one, garbage, and 1,100 connections that say nothing."""
    kept = []
    for data in (
        b'{"token": ' + b"[" * 100_000 + b"\n",
        b'{"hello": {"rank": 2, "machine": "x", "log": "/etc/passwd", "log_start": 0}, "token": "x"}\n',
        b"x" * 2_000_000,
        os.urandom(HELLO_BYTES),
    ):
        with suppress(OSError):
            kept.append(socket.create_connection(("127.0.0.1", port), timeout=2))
            kept[-1].sendall(data)
    for _ in range(1100):
        with suppress(OSError):
            kept.append(socket.create_connection(("127.0.0.1", port), timeout=2))
    return kept


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def test_a_flood_while_ranks_connect_keeps_nobody_out(ranks: Ranks):  # noqa: F811
    ranks.start(LOOP, before=LATE)
    end = time.monotonic() + 20
    while not is_open(ranks.ports[0]):
        assert time.monotonic() < end, ranks.log(0)
        time.sleep(0.02)
    strangers = flood(ranks.ports[0])
    try:
        assert len(strangers) > 1100
        ranks.wait_for("ready", 0, 1, 2)
        assert not is_open(ranks.ports[0]), "all have come: nobody else can connect"
        time.sleep(1)
        ranks.processes[2].kill()
        assert ranks.codes(0, 1) == [1, 1]
        assert "error: rank 2 on" in ranks.log(0) and "Traceback" not in ranks.log(0)
    finally:
        for one in strangers:
            one.close()


def test_a_rank_with_another_secret_is_kept_out_and_told_why(ranks: Ranks):  # noqa: F811
    other = "import os\nif os.environ['PADDLE_TRAINER_ID'] == '2': os.environ['FINETUNE_JOB_SECRET'] = 'another secret altogether'\n"
    ranks.start(LOOP, before=other, CONNECT="3", FINETUNE_JOB_SECRET="the secret of this run")
    assert ranks.codes(0, 1, 2) == [1, 1, 1]
    assert "connections were refused because they came with another secret: FINETUNE_JOB_SECRET" in ranks.log(
        0
    )
    assert "rank 2" in ranks.log(0)
    assert "does not know this run's secret" in ranks.log(2), ranks.log(2)
    assert "the secret of" not in ranks.log(0) + ranks.log(2)


def test_another_program_at_the_meeting_point_is_passed_by(ranks: Ranks):  # noqa: F811
    """It has taken rank 0's port, and answers nonsense: the ranks meet at the next one."""
    with socket.socket() as other:
        ranks.choose_ports(3)
        other.bind(("127.0.0.1", ranks.ports[0]))
        other.listen(50)
        ranks.start("print('ready', rank, flush=True)\nclose_watch()\n", CONNECT="25")
        other.settimeout(20)
        with suppress(TimeoutError):
            for _ in range(2):
                connection, _ = other.accept()
                connection.sendall(b"220 welcome to something else\r\n" * 5)
        ranks.wait_for("ready", 0, 1, 2)
        assert ranks.codes(0, 1, 2) == [0, 0, 0]


def test_a_fault_in_the_watch_is_said_and_the_run_goes_on(ranks: Ranks):  # noqa: F811
    fault = (
        "if rank == 0:\n"
        "    from finetune.processes.watch.hub import Hub\n"
        "    def look(self): raise KeyError('a fault')\n"
        "    Hub.look = look\n"
        "time.sleep(3)\nprint('went on', rank)\n"
    )
    ranks.start(fault)
    assert ranks.codes(0, 1, 2) == [0, 0, 0], [ranks.log(rank) for rank in range(3)]
    assert "warning: the watch of rank 0 on" in ranks.log(0)
    assert "ended by a fault of its own (KeyError: 'a fault'); the run goes on" in ranks.log(0)
    for rank in (0, 1, 2):
        assert f"went on {rank}" in ranks.log(rank)
    assert "warning: rank 0 on" in ranks.log(1) and "watches no more" in ranks.log(1)


def test_a_stranger_at_a_running_watch_changes_nothing(ranks: Ranks):  # noqa: F811
    """What could still come over a connection that has proved itself: too deep, too long, no message."""
    body = (
        "if rank == 2:\n"
        "    from finetune.processes.watch import watch\n"
        "    watch._watch.link.socket.sendall(b'{\"phase\": ' + b'[' * 50000 + b'\\n')\n"
    )
    ranks.start(body + LOOP)
    assert ranks.codes(0, 1) == [1, 1]
    assert "sent something else than messages of this program" in ranks.log(0)
    assert "Traceback" not in ranks.log(0) + ranks.log(1)


def test_a_thousand_ranks_are_watched_where_few_files_may_be_open(ranks: Ranks, monkeypatch):  # noqa: F811
    """The other 999 are sockets of this test; rank 0 begins with the descriptors of an old system."""
    monkeypatch.setenv("FINETUNE_JOB_SECRET", "the secret of a thousand")
    allow_open_files(4000)
    few = "import resource\nlimit = resource.getrlimit(resource.RLIMIT_NOFILE)\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, limit[1]))\n"
    ranks.start(LOOP, world=1000, missing=tuple(range(1, 1000)), before=few, CONNECT="60")
    port = ranks.ports[0]
    key = JobSecret([f"127.0.0.1:{each}" for each in ranks.ports]).look_up()
    end = time.monotonic() + 20
    while not is_open(port):
        assert time.monotonic() < end, ranks.log(0)
    links = []
    try:
        for rank in range(1, 1000):
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            assert introduce(connection, key, context_at("watch", port), rank)
            connection.sendall(json.dumps({"hello": asdict(Place(rank, "test", "", 0))}).encode() + b"\n")
            links.append(connection)
        ranks.wait_for("ready", 0)
        links[499].close()
        assert ranks.codes(0) == [1]
        assert "error: rank 500 on test is gone" in ranks.log(0)
    finally:
        for one in links:
            one.close()
