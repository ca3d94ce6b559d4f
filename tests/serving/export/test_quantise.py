"""Quantised exports: the graph and the folder's own weights answer alike, and the report says what it cost."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.adapters.files import save_adapter
from finetune.errors import UserError
from finetune.models.loading import load_model
from finetune.models.quantised.layers import packed_layers
from finetune.models.resolve import resolve_model
from finetune.serving.decoding.decoder import StaticDecoder
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.export.options import ExportOptions, parse_options
from tests.conftest import launch
from tests.merge.lora_writing import add_random_lora
from tests.serving.export.builders import build_sharp, dynamic_model, dynamic_text, export_folder, prompts

SETTINGS = DecodingSettings(max_new_tokens=30, stop_ids=())
CASES = [("chatglm2", "nf4"), ("qwen", "int8"), ("opt", "int4"), ("bloom", "int8"), ("chatglm", "int4")]
OTHERS = [
    pytest.param(family, method, marks=pytest.mark.slow_distributed)
    for family in ("llama", "chatglm2", "qwen", "bloom", "opt", "chatglm")
    for method in ("int8", "int4", "nf4", "gptq int4", "gptq int8")
    if (family, method) not in CASES
]


@pytest.mark.parametrize(("family", "method"), [*CASES, *OTHERS])
def test_graph_and_weights_answer_alike(tmp_path, small_data, family, method):
    model = build_sharp(family, tmp_path / "model")
    is_fitted = method.startswith("gptq")
    data = {"calibration_data": small_data / "train.json"} if is_fitted else {}
    out = export_folder(model, tmp_path / "out", quantize=method.rpartition(" ")[2], max_length=96, **data)
    loaded = load_model(resolve_model(out), dtype="float32")
    assert packed_layers(loaded)
    expected = dynamic_text(loaded, prompts(), SETTINGS)
    assert StaticDecoder(out).generate(prompts(), SETTINGS) == expected
    assert expected != dynamic_text(dynamic_model(model), prompts(), SETTINGS)


def test_gptq_on_texts_through_the_command(sharp_llama, small_data, tmp_path):
    adapted = add_random_lora(sharp_llama)
    (tmp_path / "lora").mkdir()
    save_adapter(adapted, tmp_path / "lora")
    out = tmp_path / "out"
    given = [
        "--quantize",
        "int4",
        "--calibration_data",
        small_data / "train.json",
        "--lora_path",
        tmp_path / "lora",
    ]
    result = launch("export_model.py", "--model_name_or_path", sharp_llama, "--output_path", out, *given)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((out / "quantisation_report.json").read_text())
    assert report["rounding"] == "gptq" and report["method"] == "int4"
    before, after = report["perplexity_before"], report["perplexity_after"]
    assert before != after and abs(np.log(after / before)) < 0.2
    assert f"{before:.4f} before, {after:.4f} after" in result.stdout
    assert ModelOptions(model_name_or_path=str(out), mode="dynamic").faults() == []
    loaded = load_model(resolve_model(out), dtype="float32")
    expected = dynamic_text(loaded, prompts(), SETTINGS)
    assert StaticDecoder(out).generate(prompts(), SETTINGS) == expected
    original = dynamic_model(sharp_llama)
    assert expected != dynamic_text(original, prompts(), SETTINGS)


def options(tmp_path, **given):
    return ExportOptions(model_name_or_path="model", output_path=tmp_path / "out", **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"calibration_data": "data"}, "calibration_data is given without quantize"),
        ({"quantize": "int4", "calibration_data": "nowhere"}, "nowhere does not exist"),
        ({"quantize": "int4", "quantize_group_size": 48}, "give -1 or a power of 2"),
        ({"quantize": "nf4", "quantize_group_size": 64}, "leave --quantize_group_size out"),
        ({"quantize": "nf4", "calibration_data": "data"}, "give it as --perplexity_data to measure only"),
        ({"quantize": "int8", "max_length": 1}, "max_length is 1"),
        ({"quantize": "int8", "dtype": "bfloat16", "device": "gpu"}, "a quantised graph computes in float32"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, given, message):
    (tmp_path / "data").mkdir()
    paths = {
        name: tmp_path / value
        for name, value in given.items()
        if name.endswith("_data") and isinstance(value, str)
    }
    with pytest.raises(UserError) as caught:
        options(tmp_path, **given | paths).check()
    assert any(message in fault for fault in caught.value.faults)


def test_usual_groups():
    words = ["--model_name_or_path", "m", "--output_path", "o", "--quantize"]
    assert parse_options([*words, "int4"]).group_size == 128
    assert parse_options([*words, "int8"]).group_size == -1
    assert parse_options([*words, "int8", "--quantize_group_size", "64"]).group_size == 64


def test_layers_that_no_group_divides_are_named(tmp_path):
    model = build_sharp("llama", tmp_path / "model", intermediate_size=44)
    with pytest.raises(UserError, match="has 44 inputs: int4 in groups of 128 would need groups of 4"):
        export_folder(model, tmp_path / "out", quantize="int4")
    assert not (tmp_path / "out").exists()
