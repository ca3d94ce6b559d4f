"""Preference alignment in many layouts: one curve, with its rewards, that of one process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import COMMON, LAYOUTS, METHODS, ONE
from tests.distributed.preference_data import build_preferences

pytestmark = pytest.mark.distributed

TOLERANCE = {"float32": 2e-5, "bf16": 5e-2}
NUM_STEPS = 6
SETTINGS: dict[str, Any] = {**COMMON, "max_steps": NUM_STEPS, "eval_steps": 3, "warmup_steps": 0, "src_length": 48,
                            "max_length": 112, "per_device_eval_batch_size": 3}  # fmt: skip
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": True, "fp16_opt_level": "O2", "rehearse_half_precision": True},
}
PACKED = {"zero_padding": True, "recompute": True}
FIGURES = ("loss", "grad_norm", "rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected",
           "eval_loss", "eval_rewards_margin", "eval_rewards_accuracy")  # fmt: skip

# Family, method, loss, layout, precision, packed.
CASES = [
    ("llama", "sft", "sigmoid", "tp2", "float32", True),
    ("chatglm2", "lora", "kto", "dp2", "float32", False),
    ("qwen", "pt", "sigmoid", "pp2", "float32", True),
    ("bloom", "lora", "orpo", "pp2", "float32", False),
    ("opt", "sft", "kto_pair", "sharding2 stage2", "float32", True),
    ("llama", "lora", "simpo", "sharding2 stage1", "bf16", False),
    ("qwen", "sft", "kto", "tp2", "bf16", True),
]
ALL_FAMILIES = ("llama", "chatglm2", "qwen", "bloom", "opt")
ALL_LAYOUTS = ("dp2", "tp2", "pp2", "sharding2 stage1", "sharding2 stage2", "sharding2 stage3", "tp2 x pp2")
ALL_LOSSES = ("sigmoid", "kto", "orpo", "ipo", "kto_pair", "simpo", "cpo")


def matrix() -> list[Any]:
    """Each family in each layout; losses, methods, precisions and packing are spread over them."""
    cases = []
    for number, (family, layout) in enumerate(itertools.product(ALL_FAMILIES, ALL_LAYOUTS)):
        place = number // len(ALL_LAYOUTS) + number
        loss = ALL_LOSSES[place % len(ALL_LOSSES)]
        method = tuple(METHODS)[place % len(METHODS)]
        precision = tuple(PRECISIONS)[place % 2]
        cases.append((family, method, loss, layout, precision, place % 3 == 0))
    return cases


def figures_of(folder: Path) -> dict[str, dict[int, float]]:
    """What is compared, by name and step."""
    found: dict[str, dict[int, float]] = {}
    for line in (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name in FIGURES:
            if name in record:
                found.setdefault(name, {})[record["step"]] = record[name]
    return found


def settings_of_reference(bench: Any, family: str, reference: str) -> dict[str, Any]:
    """A run that continues an adapter, compared with its base or with another model."""
    adapter, other = (bench.folder / f"{family} {name}" for name in ("adapter", "reference"))
    own = {"model_name_or_path": str(bench.model(family))}
    data = {"dataset_name_or_path": str(build_preferences(bench.folder / "preferences")), "loss_type": "orpo"}
    for folder, method in ((adapter, "lora"), (other, "sft")):
        if not folder.exists():
            short = SETTINGS | METHODS[method] | ONE.arguments() | {"max_steps": 3}
            bench.server.run(short | own | data, 1, folder=folder).check()
    chosen = {"base": "base", "folder": str(other), "start": "start"}[reference]
    return {"lora_path": str(adapter), "reference_model": chosen}


def differences(bench: Any, case: tuple[Any, ...], reference: str | None = None) -> dict[str, float]:
    """How far each figure of a layout is from that of one process, relative to its largest value."""
    family, method, loss, layout, precision, packed = case
    settings = SETTINGS | METHODS[method] | PRECISIONS[precision] | (PACKED if packed else {})
    settings |= {
        "loss_type": loss,
        "model_name_or_path": str(bench.model(family)),
        "dataset_name_or_path": str(build_preferences(bench.folder / "preferences")),
    }
    if reference is not None:
        settings |= settings_of_reference(bench, family, reference)
    many = LAYOUTS[layout]
    curves = [
        figures_of(bench.server.run(settings | each.arguments(), each.world).check().folder)
        for each in (many, ONE)
    ]
    found = {}
    for name in FIGURES:
        if name not in curves[1]:
            continue
        assert list(curves[0][name]) == list(curves[1][name])
        scale = max(abs(value) for value in curves[1][name].values())
        apart = [abs(curves[0][name][step] - value) for step, value in curves[1][name].items()]
        found[name] = max(apart) / max(scale, 0.1)
    return found


def check(bench: Any, case: tuple[Any, ...], reference: str | None = None) -> None:
    found = differences(bench, case, reference)
    assert {"loss", "grad_norm", "logps_chosen", "eval_loss", "eval_rewards_accuracy"} <= found.keys()
    tolerance = TOLERANCE[case[4]]
    # In half precision an answer on the border of right and wrong may cross it.
    exact = {name: value for name, value in found.items() if case[4] == "float32" or "accuracy" not in name}
    assert max(exact.values()) <= tolerance, found


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_every_layout_gives_one_curve(bench, case):
    check(bench, case)


@pytest.mark.slow_distributed
@pytest.mark.parametrize("case", matrix(), ids=lambda case: " ".join(map(str, case)))
def test_every_family_in_every_layout(bench, case):
    check(bench, case)


@pytest.mark.slow_distributed
@pytest.mark.parametrize(("family", "reference"), [("llama", "base"), ("bloom", "folder")])
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_reference_of_its_own_in_every_layout(bench, family, reference, layout):
    precision = tuple(PRECISIONS)[ALL_LAYOUTS.index(layout) % 2]
    check(bench, (family, "lora", "sigmoid", layout, precision, False), reference)


def test_the_matrix_has_every_value_of_each_side():
    families, methods, losses, layouts, precisions, packed = (
        set(side) for side in zip(*matrix(), strict=True)
    )
    assert (families, methods, losses) == (set(ALL_FAMILIES), set(METHODS), set(ALL_LOSSES))
    assert (layouts, precisions, packed) == (set(ALL_LAYOUTS), set(PRECISIONS), {False, True})
