"""A run that goes on from an adapter of peft: trained, evaluated, asked and merged, with the same model at every step."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.adapters.lora import load_lora
from finetune.errors import EXIT_USER_ERROR
from finetune.merge.lora import MergeOptions, merge
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.vocabulary import find_growth
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.predict.loading import load_responder, plan_model
from tests.adapters.peft_writing import write_peft
from tests.conftest import run_entry
from tests.end_to_end.alpaca_flow import NEW, OLD, TARGETS, add_tokenizer, write_base, write_sft
from tests.merge.lora_writing import folder_logits, logits

WHOLE = ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("alpaca"))


@pytest.fixture
def adapter(base, tmp_path):
    layers = {
        f"model.layers.{number}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}": (4, 1.5)
        for number in (0, 1)
        for name in TARGETS
    }
    write_peft(tmp_path / "peft", base, layers, whole=WHOLE, num_rows=NEW)
    add_tokenizer(tmp_path / "peft", tmp_path)
    return tmp_path / "peft"


def adapted_logits(base, adapter):
    resolved = resolve_model(base)
    growth = find_growth(OLD, NEW, family=resolved.family, other_tokenizer=True)
    return logits(load_lora(load_model(resolved, dtype="float32", growth=growth), adapter))


def test_sft_goes_on_from_it_and_the_merge_is_the_trained_model(base, adapter, tmp_path, capsys):
    before = adapted_logits(base, adapter)
    np.testing.assert_allclose(before, folder_logits(tmp_path / "peft-merged"), atol=1e-4)
    assert run_entry(write_sft(tmp_path, base, adapter, lora_rank=16)) == 0
    said = capsys.readouterr().err
    assert f"{OLD} embeddings grow to {NEW}" in said
    assert "lora_rank is 16, but the adapter" in said
    out = tmp_path / "sft"
    trained = adapted_logits(base, out)
    assert np.abs(trained - before).max() > 0.01, "it was trained"
    saved = load_file(out / "peft_model-00001-of-00001.safetensors")
    assert saved["llama.embed_tokens.weight"].shape == (NEW, 32) and saved["lm_head.weight"].shape == (
        32,
        NEW,
    )
    merge(
        MergeOptions(None, (out,), tmp_path / "merged")
    )  # the adapter names the base that it was trained on last
    np.testing.assert_allclose(folder_logits(tmp_path / "merged"), trained, atol=1e-4)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == NEW


def test_it_is_asked_as_it_is(base, adapter, tmp_path):
    options = ModelOptions(model_name_or_path=str(base), lora_path=adapter, chat_template="none")
    decoder = load_responder(plan_model(options)).decoder
    np.testing.assert_allclose(logits(decoder._model), folder_logits(tmp_path / "peft-merged"), atol=1e-4)


def test_the_bases_tokenizer_is_refused(base, adapter, tmp_path, capsys):
    assert run_entry(write_sft(tmp_path, base, adapter, tokenizer_name_or_path=None)) == EXIT_USER_ERROR
    assert (
        f"has {NEW} embeddings, but the base {OLD} and the tokenizer of this run" in capsys.readouterr().err
    )
