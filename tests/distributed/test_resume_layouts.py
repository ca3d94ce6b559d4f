"""A checkpoint of one layout, resumed in another: the curve goes on as that of one process."""

from __future__ import annotations

import pytest

from tests.distributed.layouts import LAYOUTS, ONE, TOLERANCE, curve_from, largest_difference

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow_distributed

LENGTH, SAVED = 10, 5
NOT_UNIFIED = {"unified_checkpoint": False}

# Family, method, variation, the first layout, the second, further settings.
CASES = [
    ("llama", "sft", "padded", "one", "tp2 x pp2", {}),
    ("qwen", "lora", "packed", "tp2", "sharding2 stage2", {}),
    ("llama", "sft", "padded", "tp2 x pp2", "one", NOT_UNIFIED),
    ("bloom", "sft", "padded", "sharding2 stage1", "pp2 x sharding2", {}),
]
SLOW_CASES = [
    ("chatglm2", "lora", "padded", "one", "tp2 x pp2", {}),
    ("opt", "sft", "packed", "tp2", "sharding2 stage2", {}),
    ("bloom", "sft", "padded", "pp2", "one", {}),
    ("llama", "lora", "packed", "pp2", "one", {}),
    ("chatglm2", "sft", "lazy", "dp2", "tp2", {}),
    ("opt", "lora", "lazy packed", "dp2", "tp2", {}),
    ("qwen", "sft", "packed", "sharding2 stage3", "pp2 virtual2", {}),
    ("llama", "lora", "packed", "tp2", "sharding2 stage1", {}),
    ("llama", "sft", "padded", "sharding2 stage1", "one", {"sharding_parallel_config": "split_param"}),
    ("llama", "sft", "padded", "sharding2 stage2", "sharding2 stage1", {}),
    ("gemma", "sft", "packed", "pp2 virtual2", "tp2", {}),
    ("gemma", "pt", "padded", "pp2 x sharding2", "sharding2 stage3", NOT_UNIFIED),
    ("bloom", "pt", "padded", "tp2", "pp2", {}),
    ("llama", "lora", "padded", "tp2 x pp2", "one", NOT_UNIFIED),
    ("qwen", "sft", "padded", "tp2 x sharding2", "dp2 x tp2", NOT_UNIFIED),
]


def settings_of(layout: str) -> tuple[dict, int]:
    case = ONE if layout == "one" else LAYOUTS[layout]
    return case.arguments(), case.world


@pytest.mark.parametrize(
    ("family", "method", "variation", "first", "second", "more"),
    [*CASES, *(pytest.param(*case, marks=slow) for case in SLOW_CASES)],
)
def test_the_curve_goes_on(bench, family, method, variation, first, second, more):
    settings = bench.settings(family, method, variation) | {
        "max_steps": LENGTH, "eval_steps": SAVED, "save_steps": SAVED, "save_strategy": "steps",
    }  # fmt: skip
    degrees, world = settings_of("one")
    expected = bench.server.run(settings | degrees | {"save_strategy": "no"}, world).check().curve()

    degrees, world = settings_of(first)
    before = bench.server.run(settings | degrees | more, world).check()
    assert max(largest_difference(before.curve(), expected).values()) <= TOLERANCE

    degrees, world = settings_of(second)
    checkpoint = before.folder / f"checkpoint-{SAVED}"
    after = bench.server.run(settings | degrees | {"resume_from_checkpoint": str(checkpoint)}, world).check()
    differences = largest_difference(after.curve(), curve_from(expected, SAVED + 1))
    assert max(differences.values()) <= TOLERANCE, differences
    assert not [line for line in after.logs[0].splitlines() if line.startswith("warning: ")], after.logs[0]


WEIGHTS_ONLY = {"ignore_save_lr_and_optim": True}
HALF = {"bf16": True, "fp16_opt_level": "O2", "rehearse_half_precision": True}


@pytest.mark.parametrize(
    ("family", "method", "first", "second", "more"),
    [
        ("llama", "sft", "tp2 x pp2", "sharding2 stage2", {}),
        *(
            pytest.param(*case, marks=slow)
            for case in [
                ("qwen", "lora", "sharding2 stage3", "tp2", {}),
                ("bloom", "sft", "tp2 x pp2", "one", NOT_UNIFIED),
                ("chatglm2", "sft", "tp2 x sharding2", "pp2", HALF),
                ("opt", "lora", "tp2", "dp2", HALF | NOT_UNIFIED),
            ]
        ),
    ],
)
def test_a_checkpoint_without_moments_continues_alike_everywhere(bench, family, method, first, second, more):
    """The curve is that of one process that continues from its own such checkpoint."""
    settings = bench.settings(family, method, "padded") | more | WEIGHTS_ONLY
    settings |= {"max_steps": LENGTH, "eval_steps": SAVED, "save_steps": SAVED, "save_strategy": "steps"}

    def run(layout: str, **changes):
        degrees, world = settings_of(layout)
        return bench.server.run(settings | degrees | changes, world).check()

    def continue_in(layout: str, folder):
        return run(layout, resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))

    expected = continue_in("one", run("one", unified_checkpoint=True).folder)
    after = continue_in(second, run(first).folder)
    differences = largest_difference(after.curve(), expected.curve())
    assert max(differences.values()) <= (5e-3 if "bf16" in more else TOLERANCE), differences
    assert [line for line in after.logs[0].splitlines() if "holds no moments of the optimizer" in line]
