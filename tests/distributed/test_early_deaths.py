"""Ranks of the entry script that die before all have met, and nobody but the others to notice it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import FAST, ROOT, write_arguments
from tests.distributed.processes import _environment
from tests.distributed.test_watch import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def start_ranks(arguments: Path, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Two ranks, as a launcher starts them."""
    ports = [free_port() for _ in range(3)]
    started = []
    for rank in range(2):
        place = {
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": "2",
            "PADDLE_LOCAL_RANK": str(rank),
            "PADDLE_LOCAL_SIZE": "2",
            "PADDLE_TRAINER_ENDPOINTS": ",".join(f"127.0.0.1:{port}" for port in ports[1:]),
            "PADDLE_CURRENT_ENDPOINT": f"127.0.0.1:{ports[1 + rank]}",
            "PADDLE_MASTER": f"127.0.0.1:{ports[0]}",
            "TMPDIR": str(folder),
        }
        with (folder / f"workerlog.{rank}").open("w") as log:
            command = [sys.executable, str(ROOT / "finetune_generation.py"), str(arguments)]
            started.append(subprocess.Popen(command, env=_environment(place), stdout=log, stderr=log))
    return started


@pytest.mark.parametrize(("victim", "seconds"), [(0, 0.1), (1, 0.1), (0, None), (1, None)])
def test_the_other_one_ends_within_seconds(victim, seconds, tiny_llama, small_data, tmp_path):
    """At once, or when the other one waits for it."""
    settings = FAST | {"model_name_or_path": str(tiny_llama), "dataset_name_or_path": str(small_data)}
    path = write_arguments(tmp_path / "arguments.json", **settings, output_dir=str(tmp_path / "out"))
    ranks = start_ranks(path, tmp_path)
    try:
        if seconds is None:
            wait_for_secret(tmp_path)
        else:
            time.sleep(seconds)
        ranks[victim].kill()
        began = time.monotonic()
        assert ranks[1 - victim].wait(60) == 1
        assert time.monotonic() - began < 45
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    told = (tmp_path / f"workerlog.{1 - victim}").read_text()
    assert "Traceback" not in told
    before_all, after_all = f"rank {victim} of this machine has ended before", f"rank {victim} on "
    assert before_all in told or (after_all in told and "is gone" in told), told
    if victim == 1:  # of rank 0 it may stay, for an hour at most
        assert not list(tmp_path.glob("finetune-*/.job-secret-*"))


def wait_for_secret(folder: Path) -> None:
    """Until rank 0 listens."""
    deadline = time.monotonic() + 60
    while not list(folder.glob(f"finetune-{os.geteuid()}/.job-secret-*")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
