"""LoRA over a quantised base has one curve in every layout: parts of a packed weight are those of the whole."""

from __future__ import annotations

import pytest

from tests.distributed.layouts import LAYOUTS, ONE, TOLERANCE, largest_difference
from tests.quantised_folders import write_hugging_face, write_quantised

pytestmark = pytest.mark.distributed

NF4 = {"weight_quantize_algo": "nf4", "weight_double_quant": True}
CASES = [
    ("llama", "tp2 x pp2", "padded", NF4),
    ("chatglm2", "dp2 x tp2", "packed", {"weight_quantize_algo": "fp4"}),
    ("qwen", "pp2 virtual2", "padded", {"weight_quantize_algo": "llm.int8"}),
    ("bloom", "sharding2 stage2", "packed", NF4),
    ("opt", "tp2 x sharding2", "padded", {"weight_quantize_algo": "nf4"}),
    ("chatglm2", "sharding2 stage1", "padded", NF4),
    ("llama", "sharding2 stage3", "packed", {"weight_quantize_algo": "nf4"}),
    ("qwen2", "tp2 sequence", "padded", NF4),
]


STORED_CASES = [
    ("llama", "tp2 x pp2", "packed", "gptq order"),
    ("qwen", "sharding2 stage1", "padded", "compressed zero points"),
    ("bloom", "tp2", "padded", "nf4"),
]


@pytest.mark.parametrize(("family", "layout", "variation", "quantised"), CASES)
def test_the_curve_is_that_of_one_process(bench, family, layout, variation, quantised):
    check_curve(bench, bench.settings(family, "lora", variation) | quantised, layout)


@pytest.mark.parametrize(("family", "layout", "variation", "kind"), STORED_CASES)
def test_the_curve_over_a_quantised_folder_is_that_of_one_process(
    bench, tmp_path, family, layout, variation, kind
):
    plain = write_hugging_face(bench.model(family), tmp_path / "plain")
    base = write_quantised(plain, tmp_path / "base", kind)
    check_curve(bench, bench.settings(family, "lora", variation) | {"model_name_or_path": str(base)}, layout)


def check_curve(bench, settings, layout):
    expected = bench.server.run(settings | ONE.arguments()).check().curve()
    case = LAYOUTS[layout]
    curve = bench.server.run(settings | case.arguments(), case.world).check().curve()
    differences = largest_difference(curve, expected)
    assert max(differences.values()) <= TOLERANCE, differences


def test_joined_layers_under_tensor_parallelism_are_refused(bench):
    settings = bench.settings("llama", "lora", "padded") | NF4 | {"fuse_attention_qkv": True}
    run = bench.server.run(settings | LAYOUTS["tp2"].arguments(), 2)
    assert run.codes == (2, 2)
    assert "set fuse_attention_qkv and fuse_attention_ffn to false" in run.refusal
