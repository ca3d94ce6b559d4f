"""Reward models in many layouts: one curve, that of one process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import LAYOUTS, METHODS, ONE
from tests.distributed.preference_runs import (
    PACKED,
    PRECISIONS,
    SETTINGS,
    TOLERANCE,
    build_preferences,
    figures_of,
)
from tests.distributed.test_preferences import ALL_FAMILIES, ALL_LAYOUTS

pytestmark = pytest.mark.distributed

ALL_METHODS: dict[str, dict[str, Any]] = {
    "sft": METHODS["sft"],
    "lora": METHODS["lora"],
    "quantised": METHODS["lora"] | {"weight_quantize_algo": "nf4"},
}
# Family, method, layout, precision, packed.
CASES = [
    ("llama", "lora", "tp2", "float32", True),
    ("opt", "sft", "pp2", "float32", False),
    ("llama", "sft", "sharding2 stage2", "float32", True),
]


def matrix() -> list[Any]:
    """Each family in each layout; methods, precisions and packing are spread over them."""
    cases = []
    for number, (family, layout) in enumerate(itertools.product(ALL_FAMILIES, ALL_LAYOUTS)):
        place = number // len(ALL_LAYOUTS) + number
        method = ("sft", "lora")[place % 2]
        precision = tuple(PRECISIONS)[place // 2 % 2]
        cases.append((family, method, layout, precision, place % 3 == 0))
    cases += [("llama", "quantised", layout, "float32", True) for layout in ("dp2", "tp2", "pp2")]
    return [
        *cases,
        ("llama", "lora", "tp2 sequence", "float32", True),
        ("bloom", "sft", "pp2 virtual2", "float32", True),
    ]


def write_pairs(folder: Path) -> Path:
    """The pairs of the other methods, some of them with margins."""
    build_preferences(folder)
    for path in (folder / "train.json", folder / "dev.json"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row | ({"margin": 0.3 * number} if number % 2 else {}) for number, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


def check(bench: Any, case: tuple[Any, ...]) -> None:
    family, method, layout, precision, packed = case
    settings = SETTINGS | ALL_METHODS[method] | PRECISIONS[precision] | (PACKED if packed else {})
    settings |= {"loss_type": "reward", "center_rewards_coefficient": 0.02, "learning_rate": 2e-3}
    settings["model_name_or_path"] = str(bench.model(family))
    settings["dataset_name_or_path"] = str(write_pairs(bench.folder / "rewards"))
    curves = [
        figures_of(bench.server.run(settings | each.arguments(), each.world).check().folder)
        for each in (LAYOUTS[layout], ONE)
    ]
    assert {"loss", "grad_norm", "rewards_chosen", "eval_loss", "eval_rewards_accuracy"} <= curves[1].keys()
    for name, expected in curves[1].items():
        if precision != "float32" and "accuracy" in name:
            continue  # an answer on the border of right and wrong may cross it
        assert list(curves[0][name]) == list(expected)
        scale = max(0.1, *map(abs, expected.values()))
        apart = max(abs(curves[0][name][step] - value) for step, value in expected.items())
        assert apart / scale <= TOLERANCE[precision], name
    assert curves[1]["loss"][6] != curves[1]["loss"][1], "the curve must move, or equality says nothing"


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_every_layout_gives_one_curve(bench, case):
    check(bench, case)


@pytest.mark.slow_distributed
@pytest.mark.parametrize("case", matrix(), ids=lambda case: " ".join(map(str, case)))
def test_every_family_in_every_layout(bench, case):
    check(bench, case)


def test_the_matrix_has_every_value_of_each_side():
    families, methods, layouts, precisions, packed = (set(side) for side in zip(*matrix(), strict=True))
    assert (families, methods) == (set(ALL_FAMILIES), set(ALL_METHODS))
    assert layouts == {*ALL_LAYOUTS, "tp2 sequence", "pp2 virtual2"}
    assert (precisions, packed) == (set(PRECISIONS), {False, True})
