"""Full fine-tuning of a part has one curve in every layout, also where a whole stage of a pipeline is frozen."""

from __future__ import annotations

import pytest

from finetune.checkpoints.optimizer_state import OPTIMIZER_FILES
from tests.distributed.layouts import LAYOUTS, ONE, TOLERANCE, curve_from, largest_difference

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow_distributed

STEPS = {"max_steps": 6, "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
LAST_LAYER = {"freeze_layers": 1, "freeze_parameters": ["embed_tokens"]}
UPPER_HALF = {"freeze_parameters_ratio": 0.7}
FIRST_ONLY = {"trainable_parameters": ["layers.0"]}
HALF = {"fp16_opt_level": "O2", "rehearse_half_precision": True}
CASES = [
    ("llama", "pp2", "packed", LAST_LAYER),
    ("llama", "sharding2 stage1", "padded", FIRST_ONLY),
    ("gemma", "tp2 x pp2", "padded", {"trainable_parameters": ["lm_head"]}),
    ("chatglm2", "sharding2 stage2", "packed", UPPER_HALF),
]
SLOW_CASES = [
    ("chatglm2", "pp2", "padded", FIRST_ONLY),
    ("chatglm2", "pp2", "padded", FIRST_ONLY | HALF | {"fp16": True, "scale_loss": 1024}),
    ("llama", "tp2 x pp2", "packed", LAST_LAYER | HALF | {"bf16": True}),
    ("llama", "tp2", "packed", {"trainable_parameters": ["layers.0.mlp.up_proj"]}),
    ("llama", "dp2", "packed", {"trainable_parameters": ["layers.0.mlp.gate_proj", "norm"]}),
    ("llama", "sharding2 stage3", "packed", UPPER_HALF),
    ("qwen2", "sharding2 stage3", "padded", FIRST_ONLY),
    ("bloom", "pp2 x sharding2", "packed", {"freeze_parameters_ratio": 0.6}),
    ("bloom", "tp2", "padded", {"freeze_parameters": ["word_embeddings"]}),
    ("opt", "pp2 virtual2", "packed", {"freeze_layers": 2}),
    ("opt", "dp2", "padded", {"trainable_parameters": ["embed_positions", r"norm\d?\."]}),
    ("qwen", "tp2 x sharding2", "padded", {"freeze_parameters": ["transformer.h.0", "wte"]}),
    ("qwen", "tp2 sequence", "padded", {"trainable_parameters": ["ln_1", "mlp"]}),
    ("mistral", "tp2", "padded", {"trainable_parameters": ["norm", "self_attn"]}),
    ("gemma", "pp2", "packed", {"freeze_parameters": ["embed_tokens"]}),
    ("qwen2", "dp2 x tp2", "padded", UPPER_HALF),
]


@pytest.mark.parametrize(
    ("family", "layout", "variation", "parts"),
    [*CASES, *(pytest.param(*case, marks=slow) for case in SLOW_CASES)],
)
def test_the_curve_is_that_of_one_process(bench, family, layout, variation, parts):
    settings = bench.settings(family, "sft", variation) | STEPS | parts
    one = bench.server.run(settings | ONE.arguments()).check()
    case = LAYOUTS[layout]
    several = bench.server.run(settings | case.arguments(), case.world).check()
    differences = largest_difference(several.curve(), one.curve())
    tolerance = 1e-2 if "fp16_opt_level" in parts else TOLERANCE
    assert max(differences.values()) <= tolerance, differences
    (said,) = [line for line in one.logs[0].splitlines() if line.startswith("Model: ")]
    assert said in several.logs[0] and "(100.00%)" not in said

    states = [OPTIMIZER_FILES.open(run.folder / "checkpoint-3", None, None) for run in (one, several)]
    assert states[0].names.keys() == states[1].names.keys()
    checkpoint = {"resume_from_checkpoint": str(several.folder / "checkpoint-3")}
    resumed = bench.server.run(settings | ONE.arguments() | checkpoint).check()
    differences = largest_difference(resumed.curve(), curve_from(one.curve(), 4))
    assert max(differences.values()) <= tolerance, differences
