"""Relatives of LoRA and frozen parts in every family and layout: `pytest -m slow_distributed` on this file, 15 minutes.

Each is run in one of two precisions, which alternate like the fields of a chessboard: every method, every family and every
pair of layout and method or family meets both. How a matrix is cut or placed does not depend on the precision that its
values are rounded to, so that the other half would repeat what is known.

With FINETUNE_RELATIVES_RESULTS=<file> every case adds a line to that file, from which `tools/relatives_table.py` makes the
table in the documentation; with FINETUNE_RELATIVES_CONTINUE=1 cases that stand there are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.distributed.layouts import LAYOUTS, ONE, LayoutCase, largest_difference
from tests.distributed.precisions import TOLERANCES, differences

pytestmark = [pytest.mark.distributed, pytest.mark.slow_distributed]

RESULTS = os.environ.get("FINETUNE_RELATIVES_RESULTS")
FAMILIES = ("llama", "chatglm2", "qwen", "bloom", "opt")
# Method of the settings, and what is added to them.
KINDS = {
    "DoRA": ("lora", {"use_dora": True}),
    "VeRA": ("lora", {"vera": True, "vera_rank": 16, "lora": False}),
    "LoKr": ("lora", {"lokr": True, "lokr_dim": 2, "lokr_alpha": 4.0, "lora_dropout": 0.0}),
    "MosLoRA": ("lora", {"lora_use_mixer": True}),
    "PiSSA": ("lora", {"pissa": True}),
    "frozen half": ("sft", {"freeze_parameters_ratio": 0.5}),
}
PLACES = {"one": LayoutCase(1, 2)} | {
    name: LAYOUTS[name] for name in ("dp2", "tp2", "pp2", "sharding2 stage1", "sharding2 stage2")
}
BFLOAT16 = {"bf16": True, "fp16_opt_level": "O2", "rehearse_half_precision": True}
PRECISIONS = {"float32": {}, "bfloat16": BFLOAT16}
STEPS = {"max_steps": 10, "eval_steps": 10, "learning_rate": 1e-2, "warmup_steps": 2}
FLOAT32_TOLERANCE = 1e-5


def precision_of(kind: str, family: str, layout: str) -> str:
    """The precision of a case: neighbours along any of the three have the other one."""
    numbers = list(KINDS).index(kind), FAMILIES.index(family), list(PLACES).index(layout)
    return list(PRECISIONS)[sum(numbers) % 2]


CASES = [
    (kind, family, precision_of(kind, family, layout), layout)
    for kind in KINDS
    for family in FAMILIES
    for layout in PLACES
]


@pytest.fixture(scope="module")
def expected():
    """(kind, family, precision) -> curve of one process."""
    return {}


def settings_of(bench, kind: str, family: str, precision: str) -> dict:
    method, own = KINDS[kind]
    packing = ("padded", "packed")[(list(KINDS).index(kind) + FAMILIES.index(family)) % 2]
    return bench.settings(family, method, packing) | STEPS | PRECISIONS[precision] | own


def done() -> set[tuple[str, ...]]:
    """Cases that an earlier run finished without fault."""
    if os.environ.get("FINETUNE_RELATIVES_CONTINUE") != "1" or not RESULTS or not Path(RESULTS).is_file():
        return set()
    records = map(json.loads, Path(RESULTS).read_text(encoding="utf-8").splitlines())
    return {tuple(record["case"]) for record in records if not record["faults"]}


@pytest.mark.parametrize(("kind", "family", "precision", "layout"), CASES)
def test_ten_steps_are_those_of_one_process(bench, expected, kind, family, precision, layout):
    if (kind, family, precision, layout) in done():
        pytest.skip("it stands in the results")
    settings = settings_of(bench, kind, family, precision)
    key = kind, family, precision
    if key not in expected:
        expected[key] = bench.server.run(settings | ONE.arguments()).check().curve()
    place = PLACES[layout]
    curve = bench.server.run(settings | place.arguments(), place.world).check().curve()
    if precision == "float32":
        found = largest_difference(curve, expected[key])
        limits = dict.fromkeys(found, FLOAT32_TOLERANCE)
    else:
        found = differences(curve, expected[key])
        limits = {name: limit for name, limit in TOLERANCES["bf16"].items() if name in found}
    faults = [f"{name} is {found[name]:.1e}" for name, limit in limits.items() if not found[name] <= limit]
    if RESULTS:
        record = {"case": [kind, family, precision, layout], "differences": found, "faults": faults}
        with Path(RESULTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    assert not faults, found
