"""The loss curves of full fine-tuning and LoRA equal those of transformers and peft.

Without PyTorch the comparison is with golden values that `transformers_training.py` wrote;
`make parity` installs PyTorch and compares with a live run.
"""

from __future__ import annotations

import importlib.util
import json
import os

import pytest

from tests.conftest import read_log, run_entry, write_arguments
from tests.reference.curves import CASES, COMMON, GOLDEN, HERE, NUM_STEPS, build_adapter, build_model

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"


@pytest.fixture(scope="module")
def our_curves(tmp_path_factory):
    """Our curve of each case, through the entry script, computed once."""
    folder = tmp_path_factory.mktemp("curves")
    models, found = {}, {}

    def curve(name: str) -> list[dict[str, float]]:
        if name not in found:
            case = CASES[name]
            kind = case.family if case.shape is None else f"{name}_model"
            if kind not in models:
                models[kind] = build_model(folder / kind, case.family, case.shape)
            model = models[kind]
            settings = COMMON | case.arguments
            if case.lora:
                rslora = settings.get("rslora", False)
                adapter = build_adapter(folder / f"{name}_adapter", model, family=case.family, rslora=rslora)
                settings |= {"lora_path": str(adapter)}
            settings |= {
                "model_name_or_path": str(model),
                "dataset_name_or_path": str(HERE / "data"),
                "output_dir": str(folder / name),
            }
            assert run_entry(write_arguments(folder / f"{name}.json", **settings)) == 0
            found[name] = read_log(folder / name)
        return found[name]

    return curve


def assert_same(ours: list[dict], reference: list[dict]) -> None:
    assert len(ours) == len(reference) == NUM_STEPS
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.015, "the curve must move, or equality says nothing"
    for step, (mine, theirs) in enumerate(zip(ours, reference, strict=True), start=1):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4), f"step {step}"
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3), f"step {step}"
        assert mine["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-9, abs=1e-12), (
            f"step {step}"
        )


@pytest.mark.parametrize("name", CASES)
def test_curve_equals_the_golden_one(our_curves, name):
    assert_same(our_curves(name), json.loads(GOLDEN.read_text())["curves"][name])


@pytest.mark.parity
@pytest.mark.skipif(
    not HAS_TORCH and not REQUIRED, reason="PyTorch is not installed; make parity installs it"
)
@pytest.mark.parametrize("name", CASES)
def test_curve_equals_a_live_run_of_transformers(our_curves, name):
    from tests.reference.transformers_training import reference_curve

    assert_same(our_curves(name), reference_curve(name))
