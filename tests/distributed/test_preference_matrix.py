"""DPO, KTO, ORPO and SimPO in every family, layout and precision: `pytest -m slow_distributed` on this file.

With FINETUNE_ALIGNMENT_RESULTS=<file> every case adds a line to that file, from which `tools/alignment_table.py` makes
the table in the documentation; with FINETUNE_ALIGNMENT_CONTINUE=1 cases that stand there are skipped. FINETUNE_ALIGNMENT_PART=1/7
takes every seventh case, spread over all sides.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.distributed.layouts import METHODS, ONE
from tests.distributed.method_matrix import FAMILIES, PLACES, Results
from tests.distributed.preference_runs import PRECISIONS, differences, faults_of, run, settings_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow_distributed]

RESULTS = Results("ALIGNMENT")
PART, NUM_PARTS = map(int, os.environ.get("FINETUNE_ALIGNMENT_PART", "1/1").split("/"))
LOSSES = {"DPO": "sigmoid", "KTO": "kto", "ORPO": "orpo", "SimPO": "simpo"}
STEPS = {"max_steps": 10, "eval_steps": 5}
CASES = [
    (loss, family, precision, layout)
    for loss in LOSSES
    for family in FAMILIES
    for precision in PRECISIONS
    for layout in PLACES
][PART - 1 :: NUM_PARTS]


def method_of(loss: str, family: str, precision: str) -> tuple[str, bool]:
    """Method, and whether rows are packed: spread over the other sides, the same for a row of the table."""
    place = list(LOSSES).index(loss) + FAMILIES.index(family) + list(PRECISIONS).index(precision)
    return tuple(METHODS)[place % len(METHODS)], place % 2 == 0


@pytest.fixture(scope="module")
def expected():
    """(loss, family, precision) -> figures of one process."""
    return {}


@pytest.mark.parametrize(("loss", "family", "precision", "layout"), CASES)
def test_ten_steps_are_those_of_one_process(bench, expected, loss, family, precision, layout):
    RESULTS.skip_what_is_done((loss, family, precision, layout))
    method, packed = method_of(loss, family, precision)
    case: tuple[Any, ...] = (family, method, LOSSES[loss], layout, precision, packed)
    settings, key = settings_of(bench, case, STEPS), (loss, family, precision)
    if key not in expected:
        expected[key] = run(bench, settings, ONE)
    apart = differences(run(bench, settings, PLACES[layout]), expected[key])
    faults = faults_of(apart, precision)
    RESULTS.add((*key, layout), apart, faults, method=method, packed=packed)
    assert not faults, apart
