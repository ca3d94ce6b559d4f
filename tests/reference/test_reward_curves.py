"""Curves of reward models equal those of TRL's loss over transformers and peft.

Without TRL the comparison is with golden values that `reward_training.py` wrote; `make parity` installs it and compares
with a live run.
"""

from __future__ import annotations

import importlib.util
import json
import os

import pytest

from tests.conftest import read_log, run_entry, write_arguments
from tests.reference.preference_curves import build_policy
from tests.reference.reward_curves import CASES, GOLDEN_REWARDS, build_reward_adapter
from tests.reference.test_preference_curves import assert_same

HAS_TRL = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft", "trl"))
REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
ORDINARY = (("reward_centred", False), ("reward_margins", True))
"""Part of every run of the tests; the others are compared under the mark `slow`."""
RUNS = [
    pytest.param(name, lora, marks=[] if (name, lora) in ORDINARY else [pytest.mark.slow])
    for lora in (False, True)
    for name in CASES
]


@pytest.fixture(scope="module")
def our_curve(tmp_path_factory):
    """Our curve of a case, through the entry script."""
    folder = tmp_path_factory.mktemp("rewards")
    policy = build_policy(folder / "llama")
    adapter = build_reward_adapter(folder / "adapter", policy)

    def curve(name: str, lora: bool) -> list[dict]:
        case, out = CASES[name], folder / f"{name}_{lora}"
        given = {"model_name_or_path": str(policy), "output_dir": str(out)}
        given["dataset_name_or_path"] = str(case.write_data(folder / f"{name}_data"))
        given |= {"lora_path": str(adapter)} if lora else {}
        file = write_arguments(folder / f"{name}.json", **case.arguments(lora=lora) | given)
        assert run_entry(file) == 0
        return read_log(out)

    return curve


def assert_equal(ours: list[dict], reference: list[dict]) -> None:
    assert_same(ours, reference)
    for step, (mine, theirs) in enumerate(zip(ours, reference, strict=True), start=1):
        assert mine["rewards_margin"] == pytest.approx(theirs["rewards_margin"], abs=3e-4), f"step {step}"
        assert mine["rewards_accuracy"] == pytest.approx(theirs["rewards_accuracy"]), f"step {step}"


@pytest.mark.parametrize(("name", "lora"), RUNS)
def test_curve_equals_the_golden_one(our_curve, name, lora):
    golden = json.loads(GOLDEN_REWARDS.read_text())["curves"]
    assert_equal(our_curve(name, lora), golden[f"{name}_lora" if lora else name])


@pytest.mark.parity
@pytest.mark.skipif(not HAS_TRL and not REQUIRED, reason="TRL is not installed; make parity installs it")
@pytest.mark.parametrize(("name", "lora"), RUNS)
def test_curve_equals_a_live_run_of_trl(our_curve, name, lora, live_curves):
    assert_equal(our_curve(name, lora), live_curves[f"{name}_lora" if lora else name])


@pytest.fixture(scope="module")
def live_curves():
    """The reference, trained now."""
    from tests.reference.reward_training import reference_curves

    return reference_curves()
