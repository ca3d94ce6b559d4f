"""Curves of every preference loss equal those of TRL's losses over transformers and peft.

Without TRL the comparison is with golden values that `preference_training.py` wrote; `make parity` installs it and
compares with a live run.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from tests.conftest import read_log, run_entry, write_arguments
from tests.reference.curves import NUM_STEPS
from tests.reference.preference_curves import CASES, GOLDEN_PREFERENCES, build_policy, build_policy_adapter

HAS_TRL = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft", "trl"))
REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
ORDINARY = ("sigmoid_supervised", "sigmoid_base", "orpo", "kto")
"""Losses whose LoRA runs are part of every run of the tests; the others are compared under the mark `slow`."""
RUNS = [
    pytest.param(name, lora, marks=[pytest.mark.slow] if lora and name not in ORDINARY else [])
    for lora in (False, True)
    for name in CASES
    if lora or not CASES[name].only_lora
]


@pytest.fixture(scope="module")
def our_curve(tmp_path_factory):
    """Our curve of a case, through the entry script."""
    folder = tmp_path_factory.mktemp("preferences")
    policies: dict[str, tuple[Path, Path]] = {}
    found: dict[tuple[str, bool], list[dict]] = {}

    def curve(name: str, lora: bool) -> list[dict]:
        if (name, lora) not in found:
            case, out = CASES[name], folder / f"{name}_{lora}"
            if case.family not in policies:
                model = build_policy(folder / case.family, case.family)
                adapter = build_policy_adapter(folder / f"{case.family}_adapter", model, case.family)
                policies[case.family] = model, adapter
            policy, adapter = policies[case.family]
            given = {"model_name_or_path": str(policy), "dataset_name_or_path": str(case.data())}
            given |= {"output_dir": str(out)} | ({"lora_path": str(adapter)} if lora else {})
            file = write_arguments(folder / f"{name}.json", **case.arguments(lora=lora) | given)
            assert run_entry(file) == 0
            found[name, lora] = read_log(out)
        return found[name, lora]

    return curve


def assert_same(ours: list[dict], reference: list[dict]) -> None:
    assert len(ours) == len(reference) == NUM_STEPS
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.01, "the curve must move, or equality says nothing"
    for step, (mine, theirs) in enumerate(zip(ours, reference, strict=True), start=1):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4), f"step {step}"
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-3, abs=1e-3), f"step {step}"
        assert mine["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-9, abs=1e-12)


def key(name: str, lora: bool) -> str:
    return f"{name}_lora" if lora else name


@pytest.mark.parametrize(("name", "lora"), RUNS)
def test_curve_equals_the_golden_one(our_curve, name, lora):
    golden = json.loads(GOLDEN_PREFERENCES.read_text())["curves"]
    assert_same(our_curve(name, lora), golden[key(name, lora)])


@pytest.mark.parity
@pytest.mark.skipif(not HAS_TRL and not REQUIRED, reason="TRL is not installed; make parity installs it")
@pytest.mark.parametrize(("name", "lora"), RUNS)
def test_curve_equals_a_live_run_of_trl(our_curve, name, lora, live_curves):
    assert_same(our_curve(name, lora), live_curves[key(name, lora)])


@pytest.fixture(scope="module")
def live_curves():
    """The reference, trained now."""
    from tests.reference.preference_training import reference_curves

    return reference_curves()
