"""LoRA's relatives have one curve in every layout, continue from their checkpoints, and merge into what was trained."""

from __future__ import annotations

import json

import pytest

from tests.distributed.layouts import LAYOUTS, ONE, TOLERANCE, curve_from, largest_difference

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow_distributed

STEPS = {"max_steps": 8, "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
DORA = {"use_dora": True}
PATTERNS = {"rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2}, "alpha_pattern": {"down_proj": 3}}
MIXED = {"lora_use_mixer": True}
VERA = {"vera": True, "vera_rank": 16, "lora": False}
LOKR = {"lokr": True, "lokr_dim": 2, "lokr_alpha": 4.0, "lora_dropout": 0.0}
PATTERNS_OF_CHATGLM = {"rank_pattern": {"dense": 1}, "alpha_pattern": {"dense_4h_to_h": 7}}
EMBEDDING = {"lora_target_modules": ["embed_tokens", "default"], "lora_alpha": 2}
BIAS = {"lora_bias": "all"}
HALF = {"bf16": True, "fp16_opt_level": "O2", "rehearse_half_precision": True}
CASES = [
    ("llama", "tp2", "packed", DORA | PATTERNS),
    ("qwen2", "pp2", "padded", DORA | BIAS),
    ("llama", "tp2 x pp2", "padded", {"pissa": True}),
    ("chatglm2", "sharding2 stage2", "packed", DORA),
    ("llama", "tp2", "padded", MIXED),
    ("llama", "tp2 sequence", "packed", VERA),
    ("chatglm2", "tp2", "padded", LOKR | PATTERNS_OF_CHATGLM),
]
SLOW_CASES = [
    ("llama", "tp2", "padded", EMBEDDING),
    ("llama", "tp2 sequence", "packed", EMBEDDING),
    ("chatglm2", "pp2", "packed", {"lora_target_modules": ["word_embeddings", "default"]}),
    ("qwen", "sharding2 stage2", "padded", {"lora_target_modules": ["wte", "default"]} | HALF),
    ("llama", "sharding2 stage3", "padded", EMBEDDING),
    ("llama", "tp2", "packed", EMBEDDING | {"weight_quantize_algo": "nf4"}),
    ("llama", "tp2 sequence", "packed", LOKR),
    ("qwen", "tp2", "packed", LOKR | {"weight_quantize_algo": "nf4", "lokr_factor": 3}),
    ("qwen2", "pp2", "packed", LOKR),
    ("bloom", "dp2", "padded", LOKR),
    ("opt", "sharding2 stage1", "packed", LOKR | {"decompose_both": True, "lokr_dim": 1}),
    ("llama", "sharding2 stage2", "padded", LOKR),
    ("llama", "sharding2 stage3", "padded", LOKR),
    ("llama", "tp2", "padded", LOKR | HALF),
    ("chatglm2", "tp2", "padded", VERA | {"save_projection": False}),
    ("qwen", "tp2", "packed", VERA | {"weight_quantize_algo": "nf4"}),
    ("qwen2", "pp2", "packed", VERA | {"lora_target_modules": [r".*layers\.0\..*(q|down)_proj", ".*o_proj"]}),
    ("bloom", "dp2", "padded", VERA),
    ("opt", "sharding2 stage1", "packed", VERA),
    ("llama", "sharding2 stage2", "padded", VERA),
    ("llama", "sharding2 stage3", "padded", VERA),
    ("llama", "tp2", "padded", VERA | HALF),
    ("qwen", "tp2 sequence", "padded", MIXED),
    ("bloom", "pp2", "packed", MIXED),
    ("opt", "sharding2 stage3", "padded", MIXED),
    ("chatglm2", "tp2", "padded", MIXED | {"weight_quantize_algo": "nf4"}),
    ("llama", "dp2", "packed", DORA),
    ("qwen2", "sharding2 stage1", "padded", DORA),
    ("llama", "sharding2 stage3", "packed", DORA),
    ("chatglm2", "tp2", "packed", DORA),
    ("qwen", "tp2 sequence", "packed", DORA),
    ("bloom", "tp2", "padded", DORA | {"lora_bias": "lora_only"}),
    ("opt", "tp2 x sharding2", "packed", DORA | BIAS),
    ("bloom", "pp2 x sharding2", "padded", BIAS),
    ("llama", "tp2", "packed", DORA | {"weight_quantize_algo": "nf4"}),
    ("llama", "tp2", "padded", {"init_lora_weights": "olora"}),
    ("llama", "tp2 sequence", "padded", {"init_lora_weights": "pissa_niter_3"}),
    ("qwen", "tp2", "padded", {"init_lora_weights": "pissa"}),
    ("chatglm2", "tp2", "padded", {"pissa": True}),
    ("bloom", "pp2", "padded", {"init_lora_weights": "gaussian"}),
    ("llama", "tp2", "padded", DORA | HALF),
    ("qwen2", "sharding2 stage2", "padded", {"pissa": True} | HALF),
    ("llama", "dp2", "padded", HALF | {"lora_dtype": "float32"}),
]


@pytest.mark.parametrize(
    ("family", "layout", "variation", "relative"),
    [*CASES, *(pytest.param(*case, marks=slow) for case in SLOW_CASES)],
)
def test_the_curve_is_that_of_one_process(bench, family, layout, variation, relative):
    settings = bench.settings(family, "lora", variation) | STEPS | relative
    one = bench.server.run(settings | ONE.arguments()).check()
    case = LAYOUTS[layout]
    several = bench.server.run(settings | case.arguments(), case.world).check()
    differences = largest_difference(several.curve(), one.curve())
    tolerance = 1e-2 if "bf16" in relative else TOLERANCE
    assert max(differences.values()) <= tolerance, differences

    checkpoint = {"resume_from_checkpoint": str(several.folder / "checkpoint-4")}
    resumed = bench.server.run(settings | ONE.arguments() | checkpoint).check()
    differences = largest_difference(resumed.curve(), curve_from(one.curve(), 5))
    assert max(differences.values()) <= tolerance, differences

    # Trained further from the finished adapter, which decides all but the length of the training.
    started = {"lora_path": str(several.folder), "max_steps": 1, "eval_steps": 1, "learning_rate": 0.0}
    further = bench.server.run(settings | ONE.arguments() | started).check()
    last = [line for line in map(json.loads, (several.folder / "train_log.jsonl").read_text().splitlines())]
    (evaluated,) = [each["eval_loss"] for each in last if each["kind"] == "eval" and each["step"] == 8]
    first = [line for line in map(json.loads, (further.folder / "train_log.jsonl").read_text().splitlines())]
    (again,) = [each["eval_loss"] for each in first if each["kind"] == "eval"]
    assert again == pytest.approx(evaluated, abs=tolerance)
