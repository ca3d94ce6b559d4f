"""Runs on preference data in many layouts, and how far their figures are from those of one process."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from tests.distributed.layouts import COMMON, LAYOUTS, METHODS, ONE, LayoutCase

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

Figures = dict[str, dict[int, float]]
"""By name and step."""


def build_preferences(folder: Path) -> Path:
    """21 and 5 short pairs: the last batch of an epoch is a small one."""
    folder.mkdir(parents=True, exist_ok=True)
    things, ways = (
        ("裙子", "shoes", "帽子", "a bag", "外套"),
        ("好吗", "price?", "怎么样", "colour?", "在哪里", "size?"),
    )
    prompts = [f"{thing} {way}" for thing, way in itertools.product(things, ways)]
    rows = [
        {
            "prompt": prompt,
            "chosen": f"您好 {prompt[:3]} 很好。"[: 6 + number % 7],
            "rejected": "no idea, 随便"[: 4 + number % 5],
        }
        for number, prompt in enumerate(prompts)
    ]
    for split, part in (("train", rows[:21]), ("dev", rows[21:26])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{split}.json").write_text(text, encoding="utf-8")
    return folder


def figures_of(folder: Path) -> Figures:
    """What is compared, by name and step."""
    found: Figures = {}
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


def settings_of(bench: Any, case: tuple[Any, ...], more: dict[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of a case, but for its layout.

    Args:
        bench: Models and data.
        case: Family, method, loss, layout, precision, and whether rows are packed.
        more: Further settings.
    """
    family, method, loss, _, precision, packed = case
    settings = SETTINGS | METHODS[method] | PRECISIONS[precision] | (PACKED if packed else {}) | (more or {})
    return settings | {
        "loss_type": loss,
        "model_name_or_path": str(bench.model(family)),
        "dataset_name_or_path": str(build_preferences(bench.folder / "preferences")),
    }


def run(bench: Any, settings: dict[str, Any], place: LayoutCase) -> Figures:
    """The figures of a run in a layout."""
    return figures_of(bench.server.run(settings | place.arguments(), place.world).check().folder)


def differences(found: Figures, expected: Figures) -> dict[str, float]:
    """How far each figure of a layout is from that of one process, relative to its largest value."""
    apart = {}
    for name, curve in expected.items():
        assert list(found[name]) == list(curve)
        scale = max(abs(value) for value in curve.values())
        apart[name] = max(abs(found[name][step] - value) for step, value in curve.items()) / max(scale, 0.1)
    assert {"loss", "grad_norm", "logps_chosen", "eval_loss", "eval_rewards_accuracy"} <= apart.keys()
    return apart


def faults_of(apart: dict[str, float], precision: str) -> list[str]:
    """What is further apart than rounding explains."""
    # In half precision an answer on the border of right and wrong may cross it.
    exact = {name: value for name, value in apart.items() if precision == "float32" or "accuracy" not in name}
    return [f"{name} is {value:.1e}" for name, value in exact.items() if not value <= TOLERANCE[precision]]


def check(bench: Any, case: tuple[Any, ...], reference: str | None = None) -> None:
    """Compares a layout with one process.

    Args:
        bench: Models, data and processes.
        case: See `settings_of`.
        reference: "base" or "folder" for a reference of its own.
    """
    settings = settings_of(bench, case)
    if reference is not None:
        settings |= settings_of_reference(bench, case[0], reference)
    apart = differences(run(bench, settings, LAYOUTS[case[3]]), run(bench, settings, ONE))
    assert not faults_of(apart, case[4]), apart
