"""The whole matrix of family, method and layout. It takes the better part of an hour: `pytest -m slow_distributed`.

With FINETUNE_LAYOUT_RESULTS=<file> every case adds a line to that file, from which `tools/layout_table.py` makes the
table in the documentation.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.distributed.layouts import (
    FAMILIES,
    LAYOUTS,
    METHODS,
    ONE,
    TOLERANCE,
    build_model,
    largest_difference,
    variation_of,
)
from tests.families.cases import FACTS

pytestmark = [pytest.mark.distributed, pytest.mark.slow_distributed]

_HALF_TOLERANCE = 2e-2
RESULTS = os.environ.get("FINETUNE_LAYOUT_RESULTS")
# The five families of the argument files in every layout; the others in each way of dividing a model, and where they
# could differ from llama.
ALL_LAYOUTS = ("llama", "chatglm2", "qwen", "bloom", "opt")
_EACH_WAY = ("tp2", "pp2", "sharding2 stage2", "tp2 x pp2")
FOR_OTHERS = {
    "sft": (*_EACH_WAY, "tp2 sequence", "pp2 virtual2", "dp2 x tp2", "pp2 x sharding2"),
    "lora": (*_EACH_WAY, "tp2 x sharding2"),
    "pt": (*_EACH_WAY, "dp2 x tp2"),
}
CASES = [
    (family, method, layout)
    for layout in sorted(LAYOUTS, key=lambda layout: " x " not in layout)  # products first: they say most
    for method in METHODS
    for family in FAMILIES
    if family in ALL_LAYOUTS or layout in FOR_OTHERS[method]
]


def expected_refusal(family: str, method: str, layout: str) -> str:
    """A part of the message with which a case is refused; "" for one that runs."""
    if layout == "tp4" and FACTS[family].most_tensor_parts == 2:
        return "tensor_parallel_degree is 4 but must divide"
    if layout == "tp2 sequence" and not FACTS[family].splits_rows:
        return "cannot split rows"
    return ""


@pytest.mark.parametrize(("family", "method", "layout"), CASES)
def test_the_curve_is_that_of_one_process(bench, family, method, layout):
    variation = variation_of(family, method, layout)
    run = bench.run(family, method, layout, variation)
    record = {"family": family, "method": method, "layout": layout, "variation": variation}
    words = expected_refusal(family, method, layout)
    if words:
        _note(record | {"refused": run.refusal})
        assert words in run.refusal, run.tails()
        return
    differences = largest_difference(run.check().curve(), bench.expected(family, method, variation))
    engines = json.loads((run.folder / "arguments.json").read_text(encoding="utf-8"))["layout_engines"]
    _note(record | {"differences": differences, "engines": engines})
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize(
    "precision", [{}, {"bf16": True, "fp16_opt_level": "O2"}], ids=["float32", "bf16 O2"]
)
@pytest.mark.parametrize("layout", ["tp2", "tp2 x pp2"])
def test_each_part_of_a_falcon_with_distances_has_those_of_its_heads(bench, tmp_path, layout, precision):
    model = build_model("falcon", tmp_path / "model", num_heads=6, num_kv_heads=6, hidden_size=48)
    settings = bench.settings("falcon", "sft", "packed") | {"model_name_or_path": str(model)} | precision
    case = LAYOUTS[layout]
    alone = bench.server.run(settings | ONE.arguments(), 1).check().curve()
    curve = bench.server.run(settings | case.arguments(), case.world).check().curve()
    differences = largest_difference(curve, alone)
    assert max(differences.values()) <= (_HALF_TOLERANCE if precision else TOLERANCE), differences


def _note(record: dict) -> None:
    if RESULTS:
        with Path(RESULTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
