"""Hundreds of kills at random and at chosen moments: `pytest -m kill`, about 40 minutes on two cores.

With FINETUNE_KILL_RESULTS=<file> every kill adds a line to that file, from which `tools/kill_table.py` makes the tables in
the documentation; with FINETUNE_KILL_CONTINUE=1 chains that stand there whole are left out. FINETUNE_KILL_PART=1/2 takes
every second chain. FINETUNE_KILL_CHAINS sets how many chains each subject gets. The chat server needs an interpreter with
Gradio, which FINETUNE_CHAT_PYTHON may name; without one it is skipped, and the table says so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import Bench, open_bench
from tests.kills.chains import Baseline, faults, run_chain
from tests.kills.chat_server import NAME as CHAT_SERVER
from tests.kills.chat_server import find_interpreter
from tests.kills.subjects import SCRIPTS, TRAININGS, Subject, script, server, training

pytestmark = [pytest.mark.kill]

RESULTS = os.environ.get("FINETUNE_KILL_RESULTS")
NUM_CHAINS = int(os.environ.get("FINETUNE_KILL_CHAINS", "9"))
NUM_KILLS = 5
PART, NUM_PARTS = map(int, os.environ.get("FINETUNE_KILL_PART", "1/1").split("/"))
NAMES = (*TRAININGS, *SCRIPTS, CHAT_SERVER)
CASES = [(name, seed) for seed in range(NUM_CHAINS) for name in NAMES][PART - 1 :: NUM_PARTS]


def _known() -> list[dict[str, Any]]:
    path = Path(RESULTS) if RESULTS and os.environ.get("FINETUNE_KILL_CONTINUE") == "1" else None
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    return [json.loads(line) for line in lines]


def _note(record: dict[str, Any]) -> None:
    """Adds a record to the results, where they are wanted."""
    if RESULTS:
        with Path(RESULTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")


DONE = {
    (record["subject"], record["seed"]) for record in _known() if record.get("end") and not faults(record)
}


@pytest.fixture(scope="module")
def kill_bench(tmp_path_factory):
    with open_bench(tmp_path_factory.mktemp("kills")) as bench:
        yield bench


class Baselines:
    """What uninterrupted ones left, each made once."""

    def __init__(self, bench: Bench, folder: Path):
        self._bench, self._folder = bench, folder
        self._found: dict[str, tuple[Subject, Baseline]] = {}

    def find(self, name: str) -> tuple[Subject, Baseline]:
        """A subject and what it leaves when nobody disturbs it."""
        if name not in self._found:
            subject = self._make(name)
            output = self._folder / "whole" / name / "out"
            output.parent.mkdir(parents=True)
            run = subject.start(output, None).check()
            self._found[name] = subject, Baseline(subject.contents(output), run.seconds)
        return self._found[name]

    def _make(self, name: str) -> Subject:
        if name in TRAININGS:
            return training(self._bench, name)
        sources = self._folder / "sources"
        return server(self._bench, sources) if name == CHAT_SERVER else script(self._bench, name, sources)


@pytest.fixture(scope="module")
def baselines(kill_bench, tmp_path_factory):
    return Baselines(kill_bench, tmp_path_factory.mktemp("outputs"))


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_nothing_is_lost(baselines, name, seed, tmp_path):
    if (name, seed) in DONE:
        pytest.skip("done earlier")
    if name == CHAT_SERVER and find_interpreter() is None:
        _note({"subject": name, "seed": seed, "skipped": "no interpreter with Gradio"})
        pytest.skip("no interpreter with Gradio")
    subject, baseline = baselines.find(name)
    found = []
    for record in run_chain(subject, baseline, tmp_path / "chain" / "out", seed=seed, num_kills=NUM_KILLS):
        _note(record | {"faults": faults(record)})
        found += [f"{record} {fault}" for fault in faults(record)]
    assert not found, "\n".join(found)
