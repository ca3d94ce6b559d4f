"""LoRA's relatives, merged: the model answers as base and adapter did; and in peft's form."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.adapters.lora import load_lora
from finetune.errors import UserError
from finetune.merge.lora import MergeOptions, export_peft
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from tests.merge.lora_writing import add_random_lora, folder_logits, logits, write_adapter, write_base
from tests.merge.test_lora import run_merge

DORA = {"use_dora": True}
PATTERNS = {"rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3}, "alpha_pattern": {r"mlp\.down_proj": 5}}
EMBEDDING = {"lora_target_modules": ["embed_tokens", "default"]}
CASES = [
    ("llama", DORA | PATTERNS),
    ("llama", PATTERNS | {"rslora": True}),
    ("llama", {"pissa": True}),
    ("llama", {"lora_use_mixer": True, "rank_pattern": {"q_proj": 2}}),
    ("llama", {"init_lora_weights": "olora"}),
    ("llama", {"init_lora_weights": "gaussian"}),
    ("qwen2", DORA | {"lora_bias": "all"}),
    ("bloom", DORA | {"lora_bias": "lora_only"}),
    ("chatglm2", DORA),
    ("opt", {"init_lora_weights": "olora", "lora_bias": "lora_only"}),
    ("llama", {"vera": True}),
    ("chatglm2", {"vera": True, "save_projection": False}),
    (
        "llama",
        {"lokr": True, "lokr_alpha": 6.0, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}},
    ),
    ("qwen2", {"lokr": True, "lokr_factor": 8, "lokr_dim": 1, "decompose_both": True}),
    ("bloom", {"lokr": True, "lokr_factor": 3, "lokr_dim": 40}),
    ("llama", {"init_lora_weights": "pissa_niter_2"}),
    ("llama", EMBEDDING),
    (
        "chatglm2",
        {
            "lora_target_modules": ["word_embeddings", "default"],
            "rank_pattern": {"word_embeddings": 2},
            "rslora": True,
        },
    ),
]


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / expected.std())


def load_adapted(base, folder):
    return load_lora(load_model(resolve_model(base), dtype="float32"), folder)


@pytest.mark.parametrize("hugging_face", [False, True], ids=["paddle", "hf"])
@pytest.mark.parametrize(("family", "settings"), CASES)
def test_merged_and_loaded_it_is_what_was_trained(family, settings, hugging_face, tmp_path):
    base = write_base(tmp_path / "base", family, hugging_face=hugging_face)
    expected = write_adapter(tmp_path / "adapter", base, **settings)
    assert largest(folder_logits(base), expected) > 0.05, "worth comparing"
    assert largest(logits(load_adapted(base, tmp_path / "adapter")), expected) < 1e-4
    merged = run_merge(base, tmp_path / "adapter", output=tmp_path / "merged", verify=True)
    assert largest(folder_logits(merged), expected) < 1e-3


@pytest.mark.parametrize(("family", "settings"), CASES[:4] + CASES[6:8] + CASES[10:])
def test_merged_in_memory_as_the_export_does(family, settings, tmp_path):
    adapted = add_random_lora(write_base(tmp_path / "base", family), **settings)
    expected = logits(adapted)
    adapted.merge()
    assert largest(logits(adapted.model), expected) < 1e-4
    for _, layer in adapted.model.named_sublayers():
        if getattr(layer, "merged", False):
            layer.disable_lora = True  # the weights alone
    assert largest(logits(adapted.model), expected) < 1e-4


@pytest.mark.parametrize("start", [{"pissa": True}, {"init_lora_weights": "olora"}])
def test_what_it_started_from_is_on_record(start, tmp_path):
    """So it can be taken out again, and stand after another adapter."""
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "adapter", base, **start)
    merged = run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    again = run_merge(merged, tmp_path / "adapter", output=tmp_path / "again", unmerge=True)
    assert largest(folder_logits(again), folder_logits(base)) < 1e-3
    if "pissa" not in start:
        (tmp_path / "adapter" / "initial_factors.safetensors").unlink()
        with pytest.raises(UserError, match=r"init_lora_weights olora and lacks initial_factors"):
            run_merge(base, tmp_path / "adapter", output=tmp_path / "out")


def test_lengths_are_those_of_one_base(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "plain", base)
    write_adapter(tmp_path / "dora", base, **DORA)
    with pytest.raises(UserError, match=r"use_dora, .* an adapter after the first. Name it first"):
        run_merge(base, tmp_path / "plain", tmp_path / "dora", output=tmp_path / "out")
    merged = run_merge(base, tmp_path / "dora", output=tmp_path / "merged")
    with pytest.raises(UserError, match=r"use_dora, .* --unmerge"):
        run_merge(merged, tmp_path / "dora", output=tmp_path / "out", unmerge=True)
    config = json.loads((tmp_path / "dora" / "lora_config.json").read_text())
    (tmp_path / "dora" / "lora_config.json").write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(UserError, match=r"has lengths of columns, but the configuration has use_dora false"):
        run_merge(base, tmp_path / "dora", output=tmp_path / "out")


@pytest.mark.parametrize(("family", "settings"), CASES[:4] + CASES[6:8] + CASES[10:])
def test_peft_s_form_comes_back(family, settings, tmp_path):
    base = write_base(tmp_path / "base", family)
    expected = write_adapter(tmp_path / "adapter", base, **settings)
    export_peft(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "peft"))
    assert largest(logits(load_adapted(base, tmp_path / "peft")), expected) < 1e-4
    merged = run_merge(base, tmp_path / "peft", output=tmp_path / "merged", verify=True)
    assert largest(folder_logits(merged), expected) < 1e-3


def test_kinds_stand_one_after_another_and_are_taken_out(tmp_path):
    """What is left is the base but for rounding."""
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "vera", base, vera=True)
    write_adapter(tmp_path / "lokr", base, lokr=True)
    adapters = tmp_path / "vera", tmp_path / "lokr"
    merged = run_merge(base, *adapters, output=tmp_path / "merged", verify=True)
    assert largest(folder_logits(merged), folder_logits(base)) > 0.05
    again = run_merge(merged, *adapters, output=tmp_path / "again", unmerge=True)
    assert largest(folder_logits(again), folder_logits(base)) < 1e-3


@pytest.mark.parametrize("kind", [{"vera": True}, {"lokr": True}])
def test_joined_layers_go_to_a_base_in_parts_but_not_to_peft(kind, tmp_path):
    base = write_base(tmp_path / "parts", "llama", hugging_face=True)
    overrides = {"fuse_attention_qkv": True, "fuse_attention_ffn": True}
    write_adapter(tmp_path / "adapter", base, overrides=overrides, **kind)
    merged = run_merge(base, tmp_path / "adapter", output=tmp_path / "merged", verify=True)
    assert largest(folder_logits(merged), folder_logits(base)) > 0.05
    with pytest.raises(
        UserError, match=r"has one (VeRA|LoKr) update of .*, whose parts are layers of their own"
    ):
        export_peft(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "peft"))


@pytest.mark.parametrize(("kind", "word"), [({"vera": True}, "vera_only"), ({}, "lora_only")])
def test_peft_s_word_for_biases_of_adapted_layers(kind, word, tmp_path):
    """Any other word for a kind makes peft give up."""
    base = write_base(tmp_path / "base", "opt")
    write_adapter(tmp_path / "adapter", base, lora_bias="lora_only", **kind)
    export_peft(MergeOptions(base, (tmp_path / "adapter",), tmp_path / "peft"))
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["bias"] == word
