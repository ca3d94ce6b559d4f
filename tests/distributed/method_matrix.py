"""What matrices of methods over families and layouts share: each case in one of two precisions, and its results in a file.

Precisions alternate like the fields of a chessboard: every method, every family and every pair of layout and method or
family meets both. How a matrix is cut or placed does not depend on the precision that its values are rounded to, so that
the other half would repeat what is known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import LAYOUTS, ONE, LayoutCase, largest_difference
from tests.distributed.precisions import TOLERANCES, differences

FAMILIES = ("llama", "chatglm2", "qwen", "bloom", "opt")
PLACES = {"one": LayoutCase(1, 2)} | {
    name: LAYOUTS[name] for name in ("dp2", "tp2", "pp2", "sharding2 stage1", "sharding2 stage2")
}
BFLOAT16 = {"bf16": True, "fp16_opt_level": "O2", "rehearse_half_precision": True}
PRECISIONS: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": BFLOAT16}
STEPS = {"max_steps": 10, "eval_steps": 10, "learning_rate": 1e-2, "warmup_steps": 2}
FLOAT32_TOLERANCE = 1e-5

Case = tuple[str, str, str, str]
"""Method, family, precision, layout."""


def list_cases(methods: Sequence[str]) -> list[Case]:
    """Every method, family and layout once."""

    def precision(*numbers: int) -> str:
        return list(PRECISIONS)[sum(numbers) % 2]

    return [
        (method, family, precision(first, second, third), layout)
        for first, method in enumerate(methods)
        for second, family in enumerate(FAMILIES)
        for third, layout in enumerate(PLACES)
    ]


class Results:
    """The file of results of a matrix, where one is asked for.

    Args:
        name: FINETUNE_<name>_RESULTS is the file, FINETUNE_<name>_CONTINUE skips what stands there.
    """

    def __init__(self, name: str):
        path = os.environ.get(f"FINETUNE_{name}_RESULTS")
        self.path = Path(path) if path else None
        self.continues = os.environ.get(f"FINETUNE_{name}_CONTINUE") == "1"

    def skip_what_is_done(self, case: Case) -> None:
        """Skips the running test if an earlier run finished its case without fault."""
        if not self.continues or self.path is None or not self.path.is_file():
            return
        records = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        if case in {tuple(record["case"]) for record in records if not record["faults"]}:
            pytest.skip("it stands in the results")

    def add(self, case: Case, found: dict[str, float], faults: list[str], **facts: Any) -> None:
        """Adds a line."""
        if self.path:
            record = {"case": list(case), **facts, "differences": found, "faults": faults}
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")


class Matrix:
    """Runs cases, compares them with one process, and keeps what was found.

    Args:
        name: Of the results.
    """

    def __init__(self, name: str):
        self.results = Results(name)
        self.expected: dict[tuple[str, ...], Any] = {}

    def check(self, bench: Any, case: Case, settings: dict[str, Any]) -> None:
        """Runs a case and asserts that its curve is that of one process."""
        self.results.skip_what_is_done(case)
        method, family, precision, layout = case
        key, place = (method, family, precision), PLACES[layout]
        if key not in self.expected:
            self.expected[key] = bench.server.run(settings | ONE.arguments()).check().curve()
        curve = bench.server.run(settings | place.arguments(), place.world).check().curve()
        if precision == "float32":
            found = largest_difference(curve, self.expected[key])
            limits = dict.fromkeys(found, FLOAT32_TOLERANCE)
        else:
            found = differences(curve, self.expected[key])
            limits = {name: limit for name, limit in TOLERANCES["bf16"].items() if name in found}
        faults = [
            f"{name} is {found[name]:.1e}" for name, limit in limits.items() if not found[name] <= limit
        ]
        self.results.add(case, found, faults)
        assert not faults, found
