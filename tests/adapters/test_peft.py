"""Adapters in peft's form: settings that are understood, and logits of the base that they make when merged."""

import json
import math
import re

import numpy as np
import pytest

from finetune.adapters import pattern_matching
from finetune.adapters.adapter_folder import find_adapter_faults
from finetune.adapters.files import save_adapter
from finetune.adapters.lora import load_lora
from finetune.adapters.peft_config import read_peft_rule
from finetune.errors import UserError
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from tests.adapters.peft_writing import CONFIG, write_peft
from tests.merge.lora_writing import folder_logits, logits, write_base

ATTENTION = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]


def load(base):
    return load_model(resolve_model(base), dtype="float32")


def check(base, adapter, merged, tmp_path):
    """The adapter on its base computes what the merged base does, also when it is saved and loaded once more."""
    adapted, expected = load_lora(load(base), adapter), folder_logits(merged)
    np.testing.assert_allclose(logits(adapted), expected, atol=3e-5)
    assert np.abs(folder_logits(base) - expected).max() > 0.05
    (tmp_path / "again").mkdir()
    save_adapter(adapted, tmp_path / "again")
    np.testing.assert_allclose(logits(load_lora(load(base), tmp_path / "again")), expected, atol=3e-5)
    return json.loads((tmp_path / "again" / "lora_config.json").read_text())


@pytest.mark.parametrize("pickled", [False, True])
def test_plain_adapter(pickled, tmp_path):
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    merged = write_peft(
        tmp_path / "a", base, dict.fromkeys(ATTENTION, (4, 1.5)), pickled=pickled, lora_dropout=0.25
    )
    config = check(base, tmp_path / "a", merged, tmp_path)
    assert config["target_modules"] == [
        r"llama\.layers\.\d+\.self_attn\.q_proj", r"llama\.layers\.\d+\.self_attn\.v_proj"
    ]  # fmt: skip
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.25)


def test_ranks_and_factors_of_single_layers_with_rslora(tmp_path):
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    q, v, up = (f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))
    layers = {q: (2, 6 / math.sqrt(2)), v: (4, 3.0), up: (7, 5 / math.sqrt(7))}
    merged = write_peft(
        tmp_path / "a", base, layers, use_rslora=True,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7}, alpha_pattern={"up_proj": 5},
    )  # fmt: skip
    config = check(base, tmp_path / "a", merged, tmp_path)
    assert (config["r"], config["lora_alpha"], config["rslora"]) == (4, 6, True)
    own = re.escape("llama.layers.1.self_attn.q_proj"), re.escape("llama.layers.1.mlp.up_proj")
    assert config["rank_pattern"] == {own[0]: 2, own[1]: 7} and config["alpha_pattern"] == {own[1]: 5}
    assert config["target_modules"] == [re.escape(f"llama.layers.1.{name}") for name in
                                        ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]  # fmt: skip


def test_modules_trained_whole(tmp_path):
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    whole = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"]
    merged = write_peft(tmp_path / "a", base, dict.fromkeys(ATTENTION, (4, 1.5)), whole=whole)
    config = check(base, tmp_path / "a", merged, tmp_path)
    assert set(config["trainable_modules"]) == {
        r"(.*\.)?embed_tokens\.[^.]+", r"(.*\.)?lm_head\.[^.]+", r"llama\.layers\.1\.input_layernorm\.weight"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("opt", "model.decoder.layers.1.fc1"),
        ("bloom", "transformer.h.1.self_attention.query_key_value"),
        ("qwen", "transformer.h.0.attn.c_attn"),
        ("chatglm2", "transformer.encoder.layers.1.mlp.dense_h_to_4h"),
    ],
)
def test_names_of_other_families(name, layer, tmp_path):
    base = write_base(tmp_path / "base", name, hugging_face=True)
    merged = write_peft(tmp_path / "a", base, {layer: (4, 1.5)})
    check(base, tmp_path / "a", merged, tmp_path)


def test_what_does_not_fit_the_model(tmp_path):
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    write_peft(tmp_path / "a", base, {"model.layers.1.self_attn.q_proj": (4, 1.5)})
    fused = load_model(resolve_model(base), dtype="float32", config_overrides={"fuse_attention_qkv": True})
    with pytest.raises(UserError, match=r"updates llama\.layers\.1\.self_attn\.q_proj, .*fuse_attention_qkv"):
        load_lora(fused, tmp_path / "a")
    wide = write_base(tmp_path / "wide", "llama", hugging_face=True)
    write_peft(tmp_path / "b", wide, {"model.layers.1.self_attn.q_proj": (4, 1.5)}, r=3)
    with pytest.raises(UserError, match=r"lora_A \[4, 64\].* tells of rank 3"):
        load_lora(load(base), tmp_path / "b")
    with pytest.raises(UserError, match="modules_to_save is lm_head, but the adapter"):
        load_lora(load(base), tmp_path / "a", modules_to_save=["lm_head"])


HARMLESS = {
    "revision": "main",
    "target_modules": ["q_proj"],
    "layers_to_transform": [0],
    "eva_config": {"rho": 2.0},
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "peft_version": "0.18.0",
    "init_lora_weights": "gaussian",
    "use_dora": False,
    "a_field_of_tomorrow": None,
    "trainable_token_indices": None,
    "layer_replication": [],
    "fan_in_fan_out": True,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_settings_that_say_how_it_was_made(name, tmp_path):
    rule = read_peft_rule(tmp_path, CONFIG | {name: HARMLESS[name]})
    assert (rule.rank, rule.alpha) == (4, 6.0)


OTHERWISE = {
    "alora_invocation_tokens": [5, 6],
    "layer_replication": [[0, 3], [1, 4]],
    "use_qalora": True,
    "lora_bias": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [3],
    "megatron_config": {"a": 1},
    "enable_lora": [True, False],
    "a_field_of_tomorrow": True,
    "init_lora_weights": "pissa_niter_4",
    "loftq": None,
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_settings_that_make_it_something_else(name, tmp_path):
    given = (
        {name: OTHERWISE[name]}
        if name != "loftq"
        else {"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | given))
    (fault,) = find_adapter_faults("lora_path", tmp_path)
    assert re.search(rf"adapter_config\.json has {next(iter(given))} ", fault)


def test_all_such_settings_are_named_at_once(tmp_path):
    with pytest.raises(
        UserError, match=r"has use_qalora true.*; lora_bias true.*; init_lora_weights 'something'"
    ):
        read_peft_rule(
            tmp_path, CONFIG | {"use_qalora": True, "lora_bias": True, "init_lora_weights": "something"}
        )


@pytest.mark.parametrize(
    ("field", "value"), [("r", 0), ("r", True), ("r", "8"), ("r", 2.5), ("lora_alpha", None), ("rank_pattern", {"a": 0}),
                         ("alpha_pattern", {"a": "x"}), ("rank_pattern", [1])],
)  # fmt: skip
def test_ranks_and_factors_that_are_none(field, value, tmp_path):
    with pytest.raises(UserError, match=rf"has {field} .*needed: copy it again"):
        read_peft_rule(tmp_path, CONFIG | {field: value})


@pytest.mark.parametrize(
    ("kind", "what"), [("PREFIX_TUNING", "a prefix of peft"), ("ADALORA", "AdaLoRA"), ("IA3", "IA3"), ("LOHA", "type LOHA")]
)  # fmt: skip
def test_other_types_are_named_for_what_they_are(kind, what, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    for setting in ("lora_path", "prefix_path"):
        (fault,) = find_adapter_faults(setting, tmp_path)
        assert f"has peft_type '{kind}': it is" in fault and what in fault


def test_a_pattern_that_explodes(tmp_path, monkeypatch):
    monkeypatch.setattr(pattern_matching, "SECONDS", 1.0)
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    write_peft(tmp_path / "a", base, {ATTENTION[0]: (4, 1.5)}, rank_pattern={r"((.*)*)*x": 2})
    with pytest.raises(UserError, match=r"rank_pattern.*takes more than"):
        load_lora(load(base), tmp_path / "a")


def test_a_pattern_of_paddlenlps_configuration_that_explodes(tmp_path, monkeypatch):
    monkeypatch.setattr(pattern_matching, "SECONDS", 1.0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": [r"((.*)*)*x"]}
    (tmp_path / "lora_config.json").write_text(json.dumps(config))
    model = load(write_base(tmp_path / "base", "llama"))
    with pytest.raises(UserError, match="takes more than 1 s"):
        load_lora(model, tmp_path)


def test_folders_given_under_the_wrong_setting(tmp_path):
    (tmp_path / "prefix_config.json").write_text("{}")
    assert find_adapter_faults("lora_path", tmp_path)[0].endswith(
        "holds prefix_config.json: give it as prefix_path"
    )
    assert find_adapter_faults("prefix_path", tmp_path) == []
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "lora_config.json").write_text(
        json.dumps({"r": 8, "lora_alpha": 16, "loraga": True})
    )
    assert "has loraga true" in find_adapter_faults("lora_path", tmp_path / "lora")[0]
    assert find_adapter_faults("prefix_path", tmp_path / "lora")[0].endswith("give it as lora_path")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert "but a whole model" in find_adapter_faults("lora_path", tmp_path / "model")[0]
    assert "is no folder" in find_adapter_faults("lora_path", tmp_path / "nowhere")[0]
