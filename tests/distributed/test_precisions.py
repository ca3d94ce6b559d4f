"""bfloat16 and float16 through the entry script: a part of the matrix that has every value of each of its sides."""

from __future__ import annotations

import math

import pytest

from tests.distributed.layouts import METHODS
from tests.distributed.precision_finals import faults_of_final, measure_final
from tests.distributed.precisions import (
    FAMILIES,
    LAYOUT_NAMES,
    MASTER_GRADIENTS,
    NUM_DEV,
    PRECISIONS,
    Case,
    differences,
    faults_of,
    measure,
)

pytestmark = pytest.mark.distributed

CASES = [
    Case("llama", "sft", "bf16 O2", "tp2 x pp2"),
    Case("llama", "sft", "bf16 O2", "sharding2 stage2"),
    Case("llama", "sft", MASTER_GRADIENTS, "dp2"),
    Case("chatglm2", "lora", "fp16 O2", "dp2"),
    Case("chatglm2", "pt", "bf16 O1", "pp2"),
    Case("qwen", "lora", "bf16 O2", "sharding2 stage3"),
    Case("qwen", "pt", "fp16 O2", "tp2"),
    Case("bloom", "sft", "fp16 O2", "pp2"),  # and killed inside a save
    Case("bloom", "pt", "bf16 O2", "tp2 x pp2"),
    Case("opt", "lora", "bf16 O1", "sharding2 stage1"),  # and killed after one
    Case("opt", "sft", "fp16 O1", "one"),
]
FINALS = [("qwen", "lora", "bf16 O2"), ("qwen", "pt", "fp16 O2"), ("llama", "sft", "bf16 O2")]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.family}-{case.method}-{case.precision}-{case.layout}"
)
def test_half_precision(precision_bench, case):
    faults = faults_of(measure(precision_bench, case), case.precision, case.family, case.method)
    assert not faults, faults


@pytest.mark.parametrize(("family", "method", "precision"), FINALS)
def test_what_is_left_evaluates_and_merges(precision_bench, family, method, precision):
    faults = faults_of_final(measure_final(precision_bench, family, method, precision), precision)
    assert not faults, faults


@pytest.mark.parametrize(
    ("learned", "merged", "is_fault"),
    [(2e-3, 1e-3, False), (1e-3, 1e-3, True), (1e-3, 5e-5, False), (0.0, 0.0, True)],
)
def test_an_adapter_must_have_learned_more_than_its_merge_is_away_by(learned, merged, is_fault):
    found = {"final": 0.0, "learned": learned, "num_generated": NUM_DEV, "merged": merged}
    faults = faults_of_final(found, "bf16 O2")
    assert faults == ([f"the adapter learned {learned:.1e}"] if is_fault else [])


def test_the_part_has_every_value_of_each_side():
    assert {case.family for case in CASES} == set(FAMILIES)
    assert {case.method for case in CASES} == set(METHODS)
    assert {case.precision for case in CASES} == {*PRECISIONS, MASTER_GRADIENTS}
    assert {case.layout for case in CASES} == set(LAYOUT_NAMES)
    assert len({kill.path for kill in map(Case.kill, CASES) if kill}) == 2


def test_each_method_and_precision_is_killed_once_and_resumed_in_every_other_layout():
    cases = [
        Case(family, method, precision, layout)
        for family in FAMILIES
        for method in METHODS
        for precision in PRECISIONS
        for layout in LAYOUT_NAMES
    ]
    killed = [(case.method, case.precision) for case in cases if case.kill()]
    assert sorted(killed) == sorted((method, precision) for method in METHODS for precision in PRECISIONS)
    pairs = {(case.layout, case.other_layout()) for case in cases}
    assert len(pairs) == len(LAYOUT_NAMES) * (len(LAYOUT_NAMES) - 1)
    assert all(first != second for first, second in pairs)


def test_a_fault_is_found():
    curve = {name: {1: 2.0, 2: 3.0} for name in ("loss", "grad_norm", "learning_rate", "eval_loss")}
    near, apart, far, gone = (
        curve | {"loss": {1: 2.0, 2: value}} for value in (3.002, 3.0065, 3.03, math.nan)
    )
    same = differences(curve, curve)
    good = {"float32": differences(near, curve), "one": same, "resumed": same, "other": same}
    assert faults_of(good, "bf16 O2") == []
    assert len(faults_of(good, "fp16 O2")) == 1
    assert len(faults_of(good | {"float32": differences(apart, curve)}, "bf16 O2", "llama", "sft")) == 1
    assert faults_of(good | {"float32": differences(apart, curve)}, "bf16 O2", "mixtral", "sft") == []
    assert len(faults_of(good | {"float32": differences(far, curve)}, "bf16 O2", "mixtral", "sft")) == 1
    assert "nothing was rounded" in faults_of(good | {"float32": same}, "bf16 O2")[0]
    for form in ("float32", "one", "resumed", "other", "killed"):
        for other in (far, gone):
            assert len(faults_of(good | {form: differences(other, curve)}, "bf16 O2")) == 1, form
    assert faults_of(good | {"resumed": differences(near, curve)}, "bf16 O2")
    assert faults_of(
        good | {"one": differences(curve | {"learning_rate": {1: 2.0, 2: 3.1}}, curve)}, "bf16 O2"
    )
    with pytest.raises(AssertionError):
        differences(curve, curve | {"loss": {1: 2.0}})
