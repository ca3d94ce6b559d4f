"""Each tensor's gradient equals that of transformers and peft, and of the models written here, for every family.

Without PyTorch the comparison is with sums that `transformers_gradients.py` wrote; `make parity` compares element by
element with gradients that PyTorch computes now.
"""

from __future__ import annotations

import importlib.util
import json
import os

import numpy as np
import pytest

from finetune.families.family import families
from tests.reference.gradients import (
    CASES,
    GOLDEN_GRADIENTS,
    TOLERANCE,
    distances,
    distances_from_summaries,
    our_gradients,
    summarise,
)

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Our gradients of a case, computed once."""
    found = {}

    def compute(name: str):
        if name not in found:
            found[name] = our_gradients(CASES[name], tmp_path_factory.mktemp(name))
        return found[name]

    return compute


def check(found: dict[str, float]) -> None:
    far = {name: value for name, value in found.items() if not value < TOLERANCE}
    assert found and not far


def test_every_family_has_its_cases():
    assert {case.family for case in CASES.values()} == set(families())


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_golden_ones(gradients, name):
    expected = json.loads(GOLDEN_GRADIENTS.read_text())["gradients"][name]
    check(distances_from_summaries(gradients(name), expected))


def test_wrong_gradients_are_seen():
    gradient = np.random.default_rng(0).standard_normal((32, 80)).astype(np.float32)
    bias = np.full(8, 1e-9, np.float32)
    expected = {"weight": summarise("weight", gradient), "bias": summarise("bias", bias)}
    check(distances_from_summaries({"weight": gradient * np.float32(1 + 1e-6), "bias": 0 * bias}, expected))
    one_element = gradient + np.float32(4e-3) * (gradient == gradient[7, 9])
    rows_exchanged = gradient[[1, 0, *range(2, 32)]]
    for wrong in (gradient * np.float32(1 + 3e-5), one_element, rows_exchanged):
        assert distances_from_summaries({"weight": wrong, "bias": bias}, expected)["weight"] > TOLERANCE
    assert distances_from_summaries({"weight": gradient, "bias": bias + 1}, expected)["bias"] > TOLERANCE


@pytest.mark.parity
@pytest.mark.skipif(
    not HAS_TORCH and not REQUIRED, reason="PyTorch is not installed; make parity installs it"
)
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_a_live_backward_pass(gradients, name):
    from tests.reference.transformers_gradients import reference_gradients

    check(distances(gradients(name), reference_gradients(name)))
