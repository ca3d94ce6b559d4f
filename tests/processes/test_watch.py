"""The watch between plain processes of this machine: no Paddle, no launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from finetune.processes.watch.link import meeting_points
from finetune.processes.watch.report import Place, RankState, phase_table, tail_of
from finetune.processes.watch.siblings import Siblings

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import os, sys, time
from finetune.processes.phases import PhaseRecord
from finetune.processes.watch.watch import close_watch, report_failure, start_watch
rank = int(os.environ["PADDLE_TRAINER_ID"])
phases = PhaseRecord()
start_watch(phases, hang_seconds=float(os.environ.get("HANG", 600)), connect_seconds=float(os.environ.get("CONNECT", 30)))
phases.enter("forward", 7)
"""
LOOP = """
print("ready", rank, flush=True)
while True:
    time.sleep(0.05)
"""


class Ranks:
    """Processes that believe to be the ranks of one launch."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: dict[int, subprocess.Popen] = {}
        self.ports: list[int] = []

    def choose_ports(self, world: int) -> None:
        self.ports = self.ports or _free_ports(world)

    def start(
        self, body: str, world: int = 3, *, missing: tuple[int, ...] = (), before: str = "", **env: str
    ) -> None:
        self.choose_ports(world)
        for rank in set(range(world)) - set(missing):
            own = {
                "PADDLE_TRAINER_ID": str(rank),
                "PADDLE_TRAINERS_NUM": str(world),
                "PADDLE_LOCAL_RANK": str(rank),
                "PADDLE_LOCAL_SIZE": str(world),
                "PADDLE_TRAINER_ENDPOINTS": ",".join(f"127.0.0.1:{port}" for port in self.ports),
                "PYTHONPATH": str(ROOT),
            }
            with open(self.folder / f"workerlog.{rank}", "w") as log:
                self.processes[rank] = subprocess.Popen(
                    [sys.executable, "-u", "-c", before + BEGIN + body],
                    env={**os.environ, **own, **env},
                    stdout=log,
                    stderr=log,
                )

    def log(self, rank: int) -> str:
        return (self.folder / f"workerlog.{rank}").read_text()

    def wait_for(self, text: str, *ranks: int, seconds: float = 40) -> None:
        end = time.monotonic() + seconds
        while not all(text in self.log(rank) for rank in ranks):
            assert time.monotonic() < end, {rank: self.log(rank) for rank in self.processes}
            time.sleep(0.05)

    def codes(self, *ranks: int, seconds: float = 20) -> list[int]:
        return [self.processes[rank].wait(seconds) for rank in ranks]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(tmp_path)
    yield started
    for process in started.processes.values():
        with suppress(OSError):
            process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_a_killed_rank_is_named_with_its_phase_and_last_lines(ranks: Ranks):
    ranks.start('if rank == 2: print("the last words")' + LOOP)
    ranks.wait_for("ready", 0, 1, 2)
    time.sleep(1.5)  # a phase travels with the next look at the clock
    began = time.monotonic()
    ranks.processes[2].kill()
    assert ranks.codes(0, 1) == [1, 1]
    assert time.monotonic() - began < 10
    for rank in (0, 1):
        assert (
            f"error: rank 2 on {socket.gethostname()} (127.0.0.1) is gone (killed or crashed; "
            in ranks.log(rank)
        )
        assert "last phase: forward of step 7" in ranks.log(rank)
    assert "the last words" in ranks.log(0)
    assert "the last words" not in ranks.log(1)


def test_the_death_of_rank_0_ends_the_others(ranks: Ranks):
    ranks.start('if rank == 0: print("the last words")' + LOOP)
    ranks.wait_for("ready", 0, 1, 2)
    ranks.processes[0].kill()
    assert ranks.codes(1, 2) == [1, 1]
    for rank in (1, 2):
        assert f"rank 0 on {socket.gethostname()} (127.0.0.1) is gone" in ranks.log(rank)
    assert "the last words" in ranks.log(1)
    assert "the last words" not in ranks.log(2)


def test_a_main_thread_stuck_in_native_code_ends_too(ranks: Ranks):
    ranks.start(
        "print('ready', flush=True)\nimport ctypes\nctypes.CDLL(None).sleep(300)  # releases the lock like a collective"
    )
    ranks.wait_for("ready", 0, 1, 2)
    ranks.processes[1].kill()
    assert ranks.codes(0, 2) == [1, 1]


def test_a_forked_child_does_not_hide_the_death_of_its_parent(ranks: Ranks):
    child = "if rank == 1 and os.fork() == 0:\n    print('child', os.getpid(), flush=True)\n    time.sleep(30)\n    os._exit(0)\n"
    ranks.start(child + LOOP)
    ranks.wait_for("ready", 0, 1, 2)
    ranks.wait_for("child", 1)
    try:
        ranks.processes[1].kill()
        assert ranks.codes(0, 2) == [1, 1]
    finally:
        os.kill(int(ranks.log(1).split("child ")[1].split()[0]), signal.SIGKILL)


def test_ranks_that_say_goodbye_are_not_missed(ranks: Ranks):
    ranks.start("time.sleep(0 if rank == 1 else 2.5)\nclose_watch()\nprint('done')")
    assert ranks.codes(0, 1, 2) == [0, 0, 0]
    assert all(ranks.log(rank) == "done\n" for rank in range(3))


def test_a_failure_ends_all_ranks_with_its_words(ranks: Ranks):
    ranks.start("if rank == 2:\n    report_failure('ValueError: too hot')\n    sys.exit(1)\n" + LOOP)
    assert ranks.codes(0, 1, 2) == [1, 1, 1]
    for rank in (0, 1):
        assert (
            f"error: rank 2 on {socket.gethostname()} (127.0.0.1) failed: ValueError: too hot"
            in ranks.log(rank)
        )


def test_an_error_that_all_ranks_find_is_not_repeated(ranks: Ranks):
    body = (
        "time.sleep(rank)\nif rank == 0: print('error: bad data')\nreport_failure('bad data', 2)\nsys.exit(2)"
    )
    ranks.start(body)
    assert ranks.codes(0, 1, 2) == [2, 2, 2]
    assert ranks.log(0) == "error: bad data\n"


def test_a_stopped_rank_is_reported_but_nothing_is_ended(ranks: Ranks):
    ranks.start(LOOP, HANG="3")
    ranks.wait_for("ready", 0, 1, 2)
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    ranks.wait_for("no sign of life for", 0)
    os.kill(ranks.processes[1].pid, signal.SIGCONT)
    assert "warning: rank " in ranks.log(0) and "has been in one phase for" in ranks.log(0)
    assert ranks.log(0).count("forward of step 7") >= 3
    assert "most recent call first" in ranks.log(2)
    assert all(process.poll() is None for process in ranks.processes.values())


def test_hosts_that_never_come_are_named(ranks: Ranks):
    ranks.start(LOOP, missing=(2,), CONNECT="2")
    assert ranks.codes(0, 1) == [1, 1]
    for rank in (0, 1):
        assert "1 of 3 ranks did not connect to rank 0 at 127.0.0.1 (host 127.0.0.1: rank 2)" in ranks.log(
            rank
        )


def test_a_missing_rank_0_is_named(ranks: Ranks):
    ranks.start(LOOP, missing=(0,), CONNECT="2")
    assert ranks.codes(1, 2) == [1, 1]
    assert "rank 0 on host 127.0.0.1 cannot be reached from rank 1 on" in ranks.log(1)
    assert "It has left no secret at" in ranks.log(1) and "FINETUNE_JOB_SECRET" in ranks.log(1)


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_ends_before_it_connects_is_not_waited_for(ranks: Ranks, first):
    before = f"import os\nif os.environ['PADDLE_TRAINER_ID'] == '{first}': os._exit(9)\n"
    began = time.monotonic()
    ranks.start(LOOP, before=before, CONNECT="100")
    others = sorted({0, 1, 2} - {first})
    assert ranks.codes(*others) == [1, 1]
    assert time.monotonic() - began < 20
    for rank in others:
        assert f"rank {first} of this machine has ended before all ranks had connected" in ranks.log(rank)


def test_processes_that_the_system_does_not_show_are_waited_for(tmp_path: Path):
    environment = {
        "PADDLE_TRAINER_ENDPOINTS": "a:1,a:2,a:3",
        "PADDLE_TRAINER_ID": "1",
        "PADDLE_LOCAL_RANK": "1",
    }
    environment["PADDLE_LOCAL_SIZE"] = "3"
    siblings = Siblings(environment, tmp_path)

    def show(*running: int) -> list[int]:
        for rank in running:
            (tmp_path / str(100 + rank)).mkdir(exist_ok=True)
            text = f"HOME=/\0PADDLE_TRAINER_ENDPOINTS=a:1,a:2,a:3\0PADDLE_TRAINER_ID={rank}\0"
            (tmp_path / str(100 + rank) / "environ").write_text(text)
        siblings._seen = dict.fromkeys(siblings._seen, time.monotonic() - 60)
        siblings._looked = 0
        return siblings.find_gone()

    assert show() == []
    assert show(0) == [], "not even this one is shown"
    assert show(0, 1) == [2]
    assert show(0, 1, 2) == []


def test_rank_0_is_met_where_nothing_else_listens():
    endpoints = "10.0.0.1:5000,10.0.0.1:5001,10.0.0.2:5000"
    assert meeting_points({"PADDLE_TRAINER_ENDPOINTS": endpoints, "PADDLE_MASTER": "10.0.0.1:4000"}) == [
        ("10.0.0.1", 5000),
        ("10.0.0.1", 5001),
    ]
    assert meeting_points({"PADDLE_TRAINER_ENDPOINTS": endpoints, "PADDLE_MASTER": "10.0.0.1:5000"}) == [
        ("10.0.0.1", 5001)
    ]
    assert meeting_points({"PADDLE_TRAINER_ENDPOINTS": "a:1,b:1", "PADDLE_MASTER": "a:1"}) == [("a", 2)]


def test_the_table_has_a_row_for_every_rank():
    first, second = Place(0, "a (1.2.3.4)", "", 0), Place(1, "bee (1.2.3.5)", "", 0)
    assert phase_table(
        [RankState(first, "save of step 3", 12.2, 0), RankState(second, "start", 700, 43)]
    ) == [
        "rank  host           last phase      since",
        "   0  a (1.2.3.4)    save of step 3  12 s",
        "   1  bee (1.2.3.5)  start           700 s, no sign of life for 43 s (stopped, or busy in one call)",
    ]


def test_the_tail_leaves_out_what_an_earlier_run_wrote(tmp_path: Path):
    log = tmp_path / "workerlog.3"
    log.write_text("old\n" + "new\n" * 30)
    lines = tail_of(Place(3, "a (1.2.3.4)", str(log), 4))
    assert lines == ["--- last lines of rank 3 on a (1.2.3.4) (workerlog.3):", *["new"] * 20, "---"]
    assert tail_of(Place(3, "a", str(log), 124)) == []
    assert tail_of(Place(3, "a", str(tmp_path / "gone"), 0)) == []
