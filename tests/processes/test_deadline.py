"""A rank was killed: the others end in bounded time, whatever they are blocked in."""

import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.processes.test_watch import Ranks, ranks  # noqa: F401  (a fixture)

JOIN = "import threading\nthread = threading.Thread(target=time.sleep, args=(300,))\nthread.start()\n"
NATIVE = "import ctypes\nlibc = ctypes.CDLL(None)\n"
HASTY = (
    "import finetune.processes.watch.thread as t, finetune.processes.watch.watch as w\n"
    "t._LAST_CALL_SECONDS, t._LEAVE_SECONDS, w._LEAVE_SECONDS = 2.0, 2.0, 2.0\n"
)
LATE_DEL = "class Late:\n    def __del__(self): libc.sleep(300)\nlate = Late()\n"
AT_C_EXIT = "getattr(libc, '__cxa_atexit')(libc.pause, None, None)\n"  # as a library's destructors are called


@pytest.mark.parametrize(
    "blocked",
    [
        JOIN + "print('ready', rank, flush=True)\nthread.join()\n",
        "import threading\nlock = threading.Lock()\nlock.acquire()\nprint('ready', rank, flush=True)\nlock.acquire()\n",
        NATIVE + "print('ready', rank, flush=True)\nlibc.pause()\n",
        "import socket\na, b = socket.socketpair()\nprint('ready', rank, flush=True)\na.recv(1)\n",
        JOIN + "print('ready', rank, flush=True)\nsys.exit(1)\n",
    ],
    ids=["join of a thread", "lock", "native code", "read of a socket", "join at exit"],
)
def test_survivors_that_are_blocked_end(ranks: Ranks, blocked):  # noqa: F811
    ranks.start(blocked)
    ranks.wait_for("ready", 0, 1, 2)
    ranks.processes[2].kill()
    began = time.monotonic()
    assert ranks.codes(0, 1) == [1, 1]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("killed", [0, 1])
def test_two_ranks_are_enough(ranks: Ranks, killed):  # noqa: F811
    ranks.start(NATIVE + "print('ready', rank, flush=True)\nlibc.pause()\n", world=2)
    ranks.wait_for("ready", 0, 1)
    ranks.processes[killed].kill()
    assert ranks.codes(1 - killed, seconds=10) == [1]


@pytest.mark.parametrize(
    ("hang", "codes"), [(JOIN, {1}), (NATIVE + LATE_DEL, {1}), (NATIVE + AT_C_EXIT, {-14})],
    ids=["a thread that is joined", "an object that is taken apart", "a destructor after Python has ended"],
)  # fmt: skip
def test_a_survivor_that_hangs_while_it_ends_is_ended(tmp_path, hang, codes):
    """By what works when no Python thread runs any more."""
    source = "import os, sys, time\nfrom finetune.processes import deadline\n" + hang
    source += "deadline._LAST_RESORT_SECONDS = 1.0\ndeadline.end_at_latest(1.0)\ndeadline.end_at_latest(60.0)\nsys.exit(0)\n"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode in codes, done.stderr
    assert time.monotonic() - began < 10
    if done.returncode == 1:
        assert "Timeout" in done.stderr and "most recent call first" in done.stderr


def test_ranks_that_have_failed_by_themselves_and_hang_at_exit_end(ranks: Ranks):  # noqa: F811
    body = HASTY + NATIVE + AT_C_EXIT + "print('ready', rank, flush=True)\n"
    ranks.start(body + "time.sleep(1)\nreport_failure('lost a rank')\nsys.exit(1)\n")
    began = time.monotonic()
    assert set(ranks.codes(0, 1, 2, seconds=30)) == {-14}
    assert time.monotonic() - began < 25


def test_ranks_that_are_done_and_hang_at_exit_end(ranks: Ranks):  # noqa: F811
    ranks.start(HASTY + NATIVE + AT_C_EXIT + "close_watch()\nsys.exit(0)\n")
    assert set(ranks.codes(0, 1, 2, seconds=30)) == {-14}


def test_ranks_that_end_in_time_are_not_ended(ranks: Ranks):  # noqa: F811
    ranks.start(HASTY + "close_watch()\ntime.sleep(1)\nsys.exit(0)\n")
    assert ranks.codes(0, 1, 2) == [0, 0, 0]
