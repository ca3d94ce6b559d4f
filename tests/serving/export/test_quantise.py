"""Quantised exports: the graph and the folder's own weights answer alike, and the report says what it cost."""

from __future__ import annotations

import pytest

from finetune.models.loading import load_model
from finetune.models.quantised.layers import packed_layers
from finetune.models.resolve import resolve_model
from finetune.serving.decoding.decoder import StaticDecoder
from finetune.serving.decoding.settings import DecodingSettings
from tests.serving.export.builders import build_sharp, dynamic_model, dynamic_text, export_folder, prompts

SETTINGS = DecodingSettings(max_new_tokens=30, stop_ids=())
CASES = [
    ("llama", "nf4"),
    ("llama", "int8"),
    ("llama", "int4"),
    ("chatglm2", "int4"),
    ("qwen", "nf4"),
    ("bloom", "int8"),
    ("opt", "int4"),
    ("qwen2", "int8"),
    ("gemma", "int4"),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_graph_and_weights_answer_alike(tmp_path, family, method):
    model = build_sharp(family, tmp_path / "model", hidden_size=64)
    out = export_folder(model, tmp_path / "out", quantize=method)
    loaded = load_model(resolve_model(out), dtype="float32")
    assert packed_layers(loaded)
    expected = dynamic_text(loaded, prompts(), SETTINGS)
    assert StaticDecoder(out).generate(prompts(), SETTINGS) == expected
    assert expected != dynamic_text(dynamic_model(model), prompts(), SETTINGS)
