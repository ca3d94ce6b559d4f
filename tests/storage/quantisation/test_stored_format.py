"""What config.json says of packed weights: what is read, and what is refused by its name."""

from __future__ import annotations

import pytest

from finetune.errors import UserError
from finetune.storage.quantisation.stored_format import stored_format, without_format
from tests.storage.quantisation.formats import AWQ, BNB4, GPTQ, PADDLE, compressed


@pytest.mark.parametrize(
    ("facts", "label"),
    [
        (GPTQ, "GPTQ, 4 bits, groups of 128"),
        (GPTQ | {"checkpoint_format": "gptq_v2", "bits": 8, "group_size": -1}, "GPTQ v2, 8 bits, whole rows"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "AWQ, 4 bits, groups of 64"),
        (AWQ | {"version": "GEMM"}, "AWQ, 4 bits, groups of 128"),
        (BNB4, "bitsandbytes' nf4"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "bitsandbytes' fp4, scales in 8 bits"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, "bitsandbytes' 8 bits"),
        (compressed(4), "compressed-tensors, 4 bits, groups of 128"),
        (compressed(8, -1, "int-quantized"), "compressed-tensors, 8 bits, whole rows"),
        (compressed(8, -1, "naive-quantized"), "compressed-tensors, 8 bits, whole rows"),
        (PADDLE, "PaddleNLP's llm.int8"),
        (PADDLE | {"weight_quantize_algo": "weight_only_int8"}, "PaddleNLP's weight_only_int8"),
        (GPTQ | {"told_by": "quantize_config.json"}, "GPTQ, 4 bits, groups of 128"),
    ],
)
def test_what_is_read(facts, label):
    config = {"quantization_config": facts, "torch_dtype": "bfloat16"}
    form = stored_format(config, "folder")
    assert form.label == label
    assert form.dtype == "bfloat16"
    assert without_format(config) == {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    "facts", [None, {}, {"quant_method": None, "weight_quantize_algo": None}, {"dtype": "int8"}]
)
def test_what_says_nothing(facts):
    assert stored_format({"quantization_config": facts}, "folder") is None


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (GPTQ | {"bits": 3}, "gptq in 3 bits, where 2 or 4 or 8 are known"),
        (GPTQ | {"bits": "4"}, "gptq in '4' bits"),
        (GPTQ | {"group_size": 0}, "gptq in groups of 0"),
        (GPTQ | {"checkpoint_format": "marlin"}, "GPTQ in the form 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "GPTQ in the form 'marlin'"),
        (AWQ | {"version": "gemv"}, "AWQ in the form 'gemv'"),
        (AWQ | {"bits": 8}, "awq in 8 bits"),
        ({"quant_method": "exl2", "bits": 4.0}, "the method exl2, 4.0 bits"),
        ({"quant_method": "hqq"}, "the method hqq"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "the method fp8"),
        ({"quant_method": "mxfp4"}, "the method mxfp4"),
        ({"quant_method": ["gptq"]}, "the method"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        (compressed(8, -1, "float-quantized", type="float"), "the form 'float-quantized'"),
        (compressed(8, -1, "int-quantized", type="float"), "numbers of type float"),
        (compressed(4, 128, "marlin-24"), "the form 'marlin-24'"),
        (compressed(4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "a sparse form"),
        (compressed(4) | {"transform_config": {"config_groups": {"u": {}}}}, "turned by a transform"),
        (compressed(4) | {"config_groups": {}}, "in several forms, or in none"),
        (GPTQ | {"dynamic": {"+:.*mlp.*": {"bits": 3}}}, "gptq in 3 bits"),
        (GPTQ | {"dynamic": {"+:*": {"bits": 8}}}, "the pattern '+:*' of dynamic"),
        (GPTQ | {"dynamic": ["x"]}, "dynamic is no object"),
        (
            GPTQ | {"bits": 3, "told_by": "quantize_config.json"},
            "is quantised (quantize_config.json: gptq, 3 bits)",
        ),
        (
            compressed(4)
            | {
                "config_groups": compressed(4)["config_groups"]
                | {"b": compressed(8)["config_groups"]["group_0"]}
            },
            "in several forms, of 4, 8 bits",
        ),
        (
            compressed(4)
            | {
                "config_groups": compressed(4)["config_groups"]
                | {"b": compressed(4, 64)["config_groups"]["group_0"]}
            },
            "in several forms, of 4, 4 bits",
        ),
        ({"weight_quantize_algo": "weight_only_int4"}, "in an order of the GPU that wrote them"),
        ({"weight_quantize_algo": "nf4"}, "across the rows"),
        ({"weight_quantize_algo": {"weight_only_int8": [".*mlp.*"]}}, "PaddleNLP's algorithms by layer"),
        ({"quant_type": "a8w8"}, "with quantised activations"),
        ({"bits": 4}, "4 bits in a way that it does not name"),
    ],
)
def test_what_is_not_read_is_named(facts, name):
    with pytest.raises(UserError, match="is quantised") as caught:
        stored_format({"quantization_config": facts}, "folder")
    assert name in str(caught.value)
    assert "give the folder of the model that it was made from" in str(caught.value)


def test_layers_of_other_settings_are_found_by_their_names():
    dynamic = {
        "-:.*gate.*": {},
        "+:.*down_proj": {"bits": 8, "group_size": 32},
        r"model\.layers\.1\.": {"desc_act": True},
    }
    form = stored_format({"quantization_config": GPTQ | {"dynamic": dynamic}}, "folder")
    found = {
        name: form.for_layer(f"model.layers.{name}")
        for name in ("0.mlp.down_proj", "1.mlp.down_proj", "1.mlp.up_proj", "1.mlp.gate_proj")
    }
    assert [(each.bits, each.group_size, each.is_ordered) for each in found.values()] == [
        (8, 32, False), (8, 32, False), (4, 128, True), (4, 128, False),
    ]  # fmt: skip
