"""Half precision on several CPU processes: the curve of one process, up to rounding."""

from __future__ import annotations

import pytest

from tests.distributed.layouts import LAYOUTS, ONE, largest_difference
from tests.machine.half_precision.rounding import DTYPES

pytestmark = pytest.mark.distributed

NUM_STEPS = 4
SHORT = {"bfloat16": "bf16", "float16": "fp16"}
# Of the loss and of the norm of the gradient, relative; products and messages are rounded in other places.
BOUNDS = {"bfloat16": (1.5e-3, 1e-2), "float16": (5e-4, 2e-3)}
# The first step of AdamW moves every weight by the learning rate, however small its gradient: where rounding turns the
# sign of one that is nearly zero, the second step begins elsewhere, in float16 (4.7e-3 in its norm) as in bfloat16.
NORM_FROM_FLOAT32 = 1e-2


@pytest.fixture(scope="module")
def curve_of(bench):
    """Runs a layout, or returns what it gave before."""
    known = {}

    def run(dtype: str, layout: str):
        if (dtype, layout) not in known:
            case = LAYOUTS.get(layout, ONE)
            half = {} if dtype == "float32" else {SHORT[dtype]: True, "rehearse_half_precision": True}
            settings = bench.settings("llama", "sft", "packed") | case.arguments() | half
            settings |= {
                "fp16_opt_level": "O2",
                "max_steps": NUM_STEPS,
                "eval_steps": NUM_STEPS,
                "warmup_steps": 0,
            }
            known[dtype, layout] = bench.server.run(settings, case.world).check().curve()
        return known[dtype, layout]

    return run


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_process_is_near_float32_and_not_the_same(curve_of, dtype):
    half = {name: values for name, values in curve_of(dtype, "one").items() if name != "loss_scale"}
    differences = largest_difference(half, curve_of("float32", "one"))
    assert 1e-6 < differences["loss"] < BOUNDS[dtype][0]
    assert differences["grad_norm"] < NORM_FROM_FLOAT32


LAYOUTS_OF_ALL = ("tp2", "pp2", "tp2 sequence", "sharding2 stage1", "sharding2 stage3")
CASES = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS_OF_ALL] + [("float16", "pp2 virtual2")]


@pytest.mark.parametrize(("dtype", "layout"), CASES)
def test_the_curve_is_that_of_one_process(curve_of, dtype, layout):
    differences = largest_difference(curve_of(dtype, layout), curve_of(dtype, "one"))
    loss_bound, norm_bound = BOUNDS[dtype]
    assert differences["loss"] < loss_bound and differences["eval_loss"] < loss_bound, differences
    assert differences["grad_norm"] < norm_bound, differences
    assert differences["num_label_tokens"] == differences["learning_rate"] == 0
