"""Layers by the names that people give them: keywords, last parts, Hugging Face's names, regular expressions."""

import re
import time

import pytest

from finetune.adapters import pattern_matching
from finetune.adapters.lora import add_lora
from finetune.adapters.pattern_matching import match_names
from finetune.adapters.targets import expected_layers, resolve_saved, resolve_targets, split_names
from finetune.errors import UserError
from finetune.families.family import families, get_family
from tests.families.cases import FACTS


def layers_of(name: str, num_layers: int = 2) -> list[str]:
    family = get_family(name)
    return expected_layers(family, {family.fields.num_layers: num_layers})


def chosen(given, name: str = "llama", *, without=()) -> set[str]:
    """Last parts of the names of the layers that a setting names."""
    layers = [each for each in layers_of(name) if each.rpartition(".")[2] not in without]
    linear = [each for each in layers if "norm" not in each and ".ln_" not in each]
    patterns = resolve_targets(given, get_family(name), layers, linear)
    fits = {each for each in layers if any(re.fullmatch(pattern, each) for pattern in patterns)}
    return {each.rpartition(".")[2] for each in fits}


APART, JOINED = ("qkv_proj", "gate_up_fused_proj"), ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
LINEAR = {*JOINED, "o_proj", "down_proj"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("q_proj", {"q_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("q_proj v_proj", {"q_proj", "v_proj"}),
        (["q_proj, v_proj", "o_proj"], {"q_proj", "v_proj", "o_proj"}),
        (["self_attn.q_proj"], {"q_proj"}),
        (["model.layers.1.mlp.up_proj"], {"up_proj"}),
        (["llama.layers.1.mlp.up_proj"], {"up_proj"}),
        ([".*self_attn.*"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ([r".*\.(q|v)_proj"], {"q_proj", "v_proj"}),
        ("all", LINEAR),
        ("all-linear", LINEAR),
        (["ALL"], LINEAR),
        ("default", LINEAR),
        (["default", "lm_head"], LINEAR | {"lm_head"}),
        ("qkv_proj", {"q_proj", "k_proj", "v_proj"}),
        ("W_pack,gate_up_proj", {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}),
        ("query_key_value", {"q_proj", "k_proj", "v_proj"}),
    ],
)
def test_names_of_a_llama(given, expected):
    assert chosen(given, without=APART) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("q_proj,k_proj,v_proj", {"qkv_proj"}),
        ("up_proj,gate_proj,o_proj", {"gate_up_fused_proj", "o_proj"}),
        ("default", {"qkv_proj", "gate_up_fused_proj", "o_proj", "down_proj"}),
    ],
)
def test_parts_of_joined_layers(given, expected):
    assert chosen(given, without=JOINED) == expected


def test_one_part_of_a_joined_layer_is_not_enough():
    with pytest.raises(
        UserError, match=r"q_proj is a part of qkv_proj here: name q_proj, k_proj, v_proj, or set"
    ):
        chosen("q_proj,o_proj", without=JOINED)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("opt", "fc1,fc2", {"linear1", "linear2"}),
        ("opt", "decoder.layers.0.fc1", {"linear1"}),
        ("qwen", "c_attn", {"c_attn"}),
        ("qwen", "attn.c_proj", {"c_proj"}),
        ("bloom", "query_key_value", {"query_key_value"}),
        ("bloom", "dense", {"dense"}),
        ("chatglm2", "transformer.encoder.layers.0.self_attention.query_key_value", {"query_key_value"}),
    ],
)
def test_hugging_faces_names(name, given, expected):
    assert chosen(given, name) == expected


@pytest.mark.parametrize("name", sorted(families()))
def test_all_is_every_linear_layer_of_the_built_model(name, load, settings):
    settings.lora_target_modules = ["all"]
    model, family = load(name, **FACTS[name].small)
    adapted = add_lora(model, settings, family=family, dtype="float32")
    found = {each.rpartition(".lora_A")[0] for each in adapted.model.state_dict() if each.endswith("lora_A")}
    assert {each for each in layers_of(name, 4) if re.search(r"proj|dense|linear|c_attn|query_key_value|\.w[12]$|gate$", each)
            and not re.search("qkv_proj|gate_up_fused", each)} == found  # fmt: skip


def test_modules_to_save_by_other_names(load, settings):
    layers = layers_of("opt")
    assert resolve_saved("embed_tokens", get_family("opt"), layers) == ["word_embeddings"]
    assert resolve_saved(["wte", "lm_head"], get_family("chatglm2"), layers_of("chatglm2")) == [
        "word_embeddings", "output_layer"
    ]  # fmt: skip
    assert resolve_saved("model.embed_tokens lm_head", get_family("llama"), layers_of("llama")) == [
        "embed_tokens", "lm_head"
    ]  # fmt: skip
    assert resolve_saved("nothing", get_family("llama"), layers_of("llama")) == ["nothing"]
    settings.modules_to_save = ["embed_tokens"]
    model, family = load("opt")
    adapted = add_lora(model, settings, family=family, dtype="float32")
    trained = [name for name, each in adapted.model.state_dict().items() if not each.stop_gradient]
    assert "opt.embeddings.word_embeddings.weight" in trained


@pytest.mark.parametrize("given", ["q_porj", "q_proj,q_porj", ".*q_porj.*", "self_attn", "proj"])
def test_what_fits_nothing(given):
    with pytest.raises(
        UserError, match=r"no module matches '.*last parts of this model's names are: down_proj, emb"
    ):
        chosen(given, without=APART)


@pytest.mark.parametrize("pattern", ["*q_proj", "(q_proj", "[z-a]", "(?P<x", "a" * 2000 + "*"])
def test_what_is_no_expression(pattern):
    with pytest.raises(UserError, match=r"is no regular expression|at most 1000"):
        chosen([pattern])


@pytest.mark.parametrize(
    "pattern", [r"(.*)*x", r"(\w+\.?)+!", r"([a-z]+|\w|\.)*!", r".*.*.*.*.*.*.*.*.*.*.*.*x"]
)
def test_what_explodes_ends_in_time(pattern, monkeypatch):
    monkeypatch.setattr(pattern_matching, "SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(UserError, match="takes more than 1 s"):
        chosen([pattern])
    assert time.monotonic() - began < 20


def test_hard_and_easy_patterns_together():
    names = ["a.1.q", "a.2.v"]
    assert match_names([".*q", r"(a\.)+(\d\.)+v", ".*"], names) == [["a.1.q"], ["a.2.v"], names]


def test_names_and_patterns_in_one_text():
    assert split_names("q_proj, v_proj,") == ["q_proj", "v_proj"]
    assert split_names([".*q_proj.*", " k_proj ", "a{1,2}b, c"]) == [".*q_proj.*", "k_proj", "a{1,2}b, c"]
    assert split_names(None) == []
