"""Every family, method, precision and layout: `pytest -m slow_distributed tests/distributed/test_precision_matrix.py`.

Environment:
    FINETUNE_PRECISION_RESULTS: A file to which every case adds a line, from which `tools/precision_table.py` makes the
        table in the documentation.
    FINETUNE_PRECISION_CONTINUE: With 1, cases that stand in that file without fault, of the same commit, are skipped.
    FINETUNE_MATRIX_PART: 1/2 takes the first half of the families and methods, 2/2 the second, to be run side by side.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import METHODS
from tests.distributed.precision_finals import faults_of_final, measure_final
from tests.distributed.precisions import (
    FAMILIES,
    LAYOUT_NAMES,
    MASTER_GRADIENTS,
    OTHER_FAMILIES,
    PRECISIONS,
    Case,
    faults_of,
    measure,
)
from tests.distributed.server_runs import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.slow_distributed]

RESULTS = os.environ.get("FINETUNE_PRECISION_RESULTS")
PART, _, NUM_PARTS = os.environ.get("FINETUNE_MATRIX_PART", "1/1").partition("/")
FINAL = "final folder"
PAIRS = [(family, method) for family in (*FAMILIES, *OTHER_FAMILIES) for method in METHODS][
    int(PART) - 1 :: int(NUM_PARTS)
]
FOR_OTHERS = {"bf16 O2": ("one", "tp2", "pp2", "sharding2 stage2", "tp2 x pp2")}
# Gradients in the master type are looked at once: they do not depend on family and method.
PAIR_OF_MASTER_GRADIENTS = ("llama", "sft")


# In this order the runs that several cases are compared with need not be kept for long.
def layouts_of(family: str, precision: str) -> tuple[str, ...]:
    """The layouts in which a family runs in a precision, and what it leaves."""
    layouts = LAYOUT_NAMES if family in FAMILIES else FOR_OTHERS.get(precision, ())
    return (*layouts, FINAL) if layouts and precision in PRECISIONS else layouts


CASES = [
    (family, method, precision, layout)
    for family, method in PAIRS
    for precision in [
        *PRECISIONS,
        *([MASTER_GRADIENTS] if (family, method) == PAIR_OF_MASTER_GRADIENTS else []),
    ]
    for layout in layouts_of(family, precision)
]


@pytest.mark.parametrize(("family", "method", "precision", "layout"), CASES)
def test_half_precision(precision_bench, family, method, precision, layout):
    record = {
        "family": family,
        "method": method,
        "precision": precision,
        "layout": layout,
        "commit": commit(),
    }
    if is_done(record):
        pytest.skip("it stands in the results")
    precision_bench.forget(keep=(family, method, precision))
    if layout == FINAL:
        faults = note(
            record, lambda: measure_final(precision_bench, family, method, precision), faults_of_final
        )
    else:
        case = Case(family, method, precision, layout)
        check = partial(faults_of, family=family, method=method)
        faults = note(record, lambda: measure(precision_bench, case), check)
    assert not faults, faults


def note(
    record: dict[str, Any],
    run: Callable[[], dict[str, Any]],
    check: Callable[[dict[str, Any], str], list[str]],
) -> list[str]:
    """Measures, and adds a line to the results whatever comes of it; the faults."""
    began = time.monotonic()
    try:
        found = run()
        record |= found | {"faults": check(found, record["precision"])}
    except BaseException as error:  # an outcome of pytest, such as its time limit, is no Exception
        record["faults"] = [str(error) or repr(error)]
        raise
    finally:
        record["seconds"] = round(time.monotonic() - began, 2)
        if RESULTS:
            with Path(RESULTS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
    return record["faults"]


def is_done(record: dict[str, Any]) -> bool:
    return os.environ.get("FINETUNE_PRECISION_CONTINUE") == "1" and key(record) in done()


def key(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(record[name] for name in ("family", "method", "precision", "layout", "commit"))


@cache
def done() -> frozenset[tuple[str, ...]]:
    """The cases that an earlier run of the matrix finished."""
    if not (RESULTS and Path(RESULTS).is_file()):
        return frozenset()
    records = map(json.loads, Path(RESULTS).read_text(encoding="utf-8").splitlines())
    return frozenset(key(record) for record in records if not record["faults"])


@cache
def commit() -> str:
    """The commit that is tested; "" outside a repository."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()
