"""The watch, common stops and the comparison of replicas under the launcher, over gloo."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.processes import _environment, launch_script

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORKER = Path(__file__).with_name("watch_worker.py")
HOST = f"{socket.gethostname()} ("


def test_a_rank_that_dies_in_mid_run_ends_the_launch_with_its_last_lines():
    began = time.monotonic()
    launch = launch_script(WORKER, 3, ["die", "3", "1"], timeout=100)
    assert launch.exit_code != 0
    assert time.monotonic() - began < 90, "starting included"
    assert f"error: rank 2 on {HOST}" in launch.outputs[0], launch.tails()
    assert "is gone (killed or crashed; last phase: reduction of step 5)" in launch.outputs[0], launch.tails()
    assert "the last words" in launch.launcher_output, launch.tails()


def test_a_signal_to_one_rank_stops_all_after_the_same_step():
    launch = launch_script(WORKER, 2, ["stop", "2", "1"], timeout=100).check()
    for output in launch.outputs:
        assert "stopped after step 5" in output, launch.tails()


def test_replicas_that_differ_are_named_on_every_rank():
    launch = launch_script(WORKER, 4, ["compare", "2", "2"], timeout=100).check()
    for output in launch.outputs:
        lines = [line for line in output.splitlines() if line.startswith("ranks hold different values")]
        assert len(lines) == 2, launch.tails()
        assert "after step 12 where they must hold the same: matrix (rank 3). In brackets" in lines[0]
        assert "matrix (rank 1, 3). In brackets" in lines[1]


@pytest.mark.parametrize(
    ("what", "text", "killed"), [("connect", "connect", 2), ("reduce", "step 5", 0), ("save", "save", 1)]
)
def test_without_a_launcher_too_a_killed_rank_ends_the_others(tmp_path: Path, what, text, killed):
    """Nobody helps: the survivors end by themselves, whatever they wait for."""
    ports = [free_port() for _ in range(4)]
    processes = []
    for rank in range(3):
        place = {
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": "3",
            "PADDLE_TRAINER_ENDPOINTS": ",".join(f"127.0.0.1:{port}" for port in ports[1:]),
            "PADDLE_CURRENT_ENDPOINT": f"127.0.0.1:{ports[1 + rank]}",
            "PADDLE_MASTER": f"127.0.0.1:{ports[0]}",
        }
        with (tmp_path / str(rank)).open("w") as log:
            command = [sys.executable, str(WORKER), what, "3", "1"]
            processes.append(subprocess.Popen(command, env=_environment(place), stdout=log, stderr=log))
    try:
        end = time.monotonic() + 90
        while text not in (tmp_path / str(killed)).read_text():
            assert time.monotonic() < end and all(one.poll() is None for one in processes)
            time.sleep(0.05)
        processes[killed].kill()
        began = time.monotonic()
        assert [processes[rank].wait(40) for rank in range(3) if rank != killed] == [1, 1]
        assert time.monotonic() - began < 20
        for rank in {0, 1, 2} - {killed}:
            told = (tmp_path / str(rank)).read_text()
            assert f"error: rank {killed} on {HOST}" in told and " is gone" in told, told
    finally:
        for one in processes:
            one.kill()
            one.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
