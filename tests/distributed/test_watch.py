"""The watch, common stops and the comparison of replicas under the launcher, over gloo."""

import socket
import time
from pathlib import Path

import pytest

from tests.distributed.processes import launch_script

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
