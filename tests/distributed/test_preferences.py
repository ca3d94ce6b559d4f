"""Preference alignment in many layouts: one curve, with its rewards, that of one process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.distributed.layouts import METHODS
from tests.distributed.preference_runs import PRECISIONS, check

pytestmark = pytest.mark.distributed

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
ALL_FAMILIES = ("llama", "chatglm2", "qwen", "bloom", "opt", "chatglm")
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
