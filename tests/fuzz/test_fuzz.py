"""A small sample of every kind of damaged file, and the whole run: `pytest -m fuzz tests/fuzz`.

FINETUNE_FUZZ_RESULTS names the file that the whole run writes, from which tools/robustness_table.py makes the table of
docs/robustness.md; FINETUNE_FUZZ_CASES is the number of cases of each kind where fewer are wanted.
"""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
from hypothesis import strategies as st

from tests.conftest import launch
from tests.fuzz import runner
from tests.fuzz.runner import Target, run_target
from tests.fuzz.targets import TARGETS
from tools import marked_tables, robustness_table

NAMES = [target.name for target in TARGETS]
SAMPLE = 12
MAX_SAMPLE_SECONDS = 200
MAX_SECONDS = 3 * 3600


def run(*options: object, timeout: float) -> list[dict]:
    result = launch("-m", "tests.fuzz.run", *options, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"name"')]


def test_a_sample_of_every_kind_ends_in_a_message(tmp_path):
    records = run("--cases", SAMPLE, "--folder", tmp_path / "cases", timeout=MAX_SAMPLE_SECONDS)
    assert [record["name"] for record in records] == NAMES
    for record in records:
        assert record["cases"] == SAMPLE and record["faults"] == 0
        assert record["ends"].keys() <= {"0", "1", "2"}


@pytest.mark.fuzz
@pytest.mark.timeout(MAX_SECONDS)
@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_thousands_of_every_kind_end_in_a_message(target, tmp_path):
    options = ["--target", target.name, "--folder", tmp_path / "cases"]
    if cases := os.environ.get("FINETUNE_FUZZ_CASES"):
        options += ["--cases", cases]
    if results := os.environ.get("FINETUNE_FUZZ_RESULTS"):
        options += ["--results", results]
    (record,) = run(*options, timeout=MAX_SECONDS)
    assert record["cases"] >= int(cases or target.num_cases)


# The harness itself: what must be found is found


def _hang(_good, _case, _place):
    time.sleep(60)


def _crash(_good, _case, _place):
    os.abort()


def _traceback(_good, _case, _place):
    raise KeyError("a fault of the program")


def _fill_memory(_good, _case, _place):
    bytearray(2**50)


def _read_wrongly(_good, _case, _place):
    raise runner.WrongWeights("WrongWeights: other values")


@pytest.mark.parametrize(
    ("act", "end"),
    [(_hang, "hang"), (_crash, "crash"), (_traceback, "traceback"), (_fill_memory, "memory"), (_read_wrongly, "weights")],
)  # fmt: skip
def test_a_fault_is_found_and_blamed_on_its_case(act, end, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MAX_SECONDS", 3 if act is _hang else 60)

    def run_case(good, case, place):
        if case == 7:
            act(good, case, place)

    cases = st.integers(0, 9)
    target = Target(
        name="test", num_cases=0, prepare=lambda _folder: None, draw=lambda _good: cases, run=run_case
    )
    outcomes = []
    for outcome in run_target(target, 40, 0, tmp_path / "cases"):
        outcomes.append(outcome)
        if outcome.is_fault:
            break
    assert outcomes[-1].end == end and all(outcome.end == "0" for outcome in outcomes[:-1])
    kept = (tmp_path / "cases" / str(outcomes[-1].number)).is_dir()
    assert kept


def test_the_same_seed_draws_the_same_cases(tmp_path):
    def draw(folder, seed):
        said = []
        target = Target(
            name="test", num_cases=0, prepare=lambda _folder: None, draw=lambda _good: st.binary(),
            run=lambda _good, case, _place: print(case, file=sys.stderr),
        )  # fmt: skip
        said.extend(outcome.said for outcome in run_target(target, 20, seed, tmp_path / folder))
        return said

    assert draw("a", 1) == draw("b", 1) != draw("c", 2)


def test_the_table_adds_up_the_runs_of_a_kind(tmp_path, monkeypatch):
    records = [
        {"name": "pickles", "seed": 0, "ends": {"2": 3, "0": 1}, "slowest": 0.26},
        {"name": "pickles", "seed": 9, "ends": {"2": 1000, "hang": 1}, "slowest": 60.04},
        {"name": "templates", "seed": 0, "ends": {"1": 2}, "slowest": 1.0},
    ]
    (tmp_path / "results.json").write_text(json.dumps(records))
    begin, end = marked_tables.table_marks()
    for page in ("robustness.md", "robustness_zh.md"):
        (tmp_path / page).write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    monkeypatch.setattr(
        sys, "argv", ["robustness_table.py", str(tmp_path / "results.json"), "--folder", str(tmp_path)]
    )
    robustness_table.main()
    lines = (tmp_path / "robustness.md").read_text().splitlines()
    assert lines[0] == "above" and lines[-1] == "below" and "old" not in lines
    assert "| pickles | 1,005 | 1 | 1,003 | 0 | 1 | 60.0 |" in lines
    assert "| templates | 2 | 0 | 0 | 2 | 0 | 1.0 |" in lines
    assert (
        "| 对话模板 | 2 | 0 | 0 | 2 | 0 | 1.0 |" in (tmp_path / "robustness_zh.md").read_text().splitlines()
    )
