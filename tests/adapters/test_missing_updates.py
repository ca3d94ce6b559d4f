"""Adapters that lack updates of some layers: named when they promise them, said when they say so, in every command."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.adapters.missing_updates import describe_missing
from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.merge.lora import MergeOptions, merge
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.predict.loading import plan_model
from tests.adapters.peft_writing import write_peft
from tests.merge.lora_writing import write_adapter, write_base

Q, V = "self_attn.q_proj", "self_attn.v_proj"
EVERY = [f"model.layers.{number}.{name}" for number in (0, 1) for name in (Q, V)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("missing") / "base", "llama", hugging_face=True)


def described(base, folder, layers, family="llama", **config):
    write_peft(folder, base, dict.fromkeys(layers, (4, 1.5)), **config)
    return describe_missing(folder, get_family(family), json.loads((base / "config.json").read_text()))


PROMISES = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "longer names": {"target_modules": [Q, "layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"]},
    "an expression": {"target_modules": r".*\.(q|v)_proj"},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "left out": {"target_modules": r".*self_attn.*", "exclude_modules": ["k_proj", "o_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promised_layer_without_an_update_is_named(promise, base, tmp_path):
    assert described(base, tmp_path / "whole", EVERY, **PROMISES[promise]) == []
    (line,) = described(base, tmp_path / "a", EVERY[:-1], **PROMISES[promise])
    assert line.startswith(
        f"warning: the adapter in {tmp_path / 'a'} has nothing for 1 of the 4 layers that its"
    )
    assert f"adapter_config.json names: {EVERY[-1]}. They stay as the base has them, as in peft" in line


def test_many_are_counted(base, tmp_path):
    (line,) = described(base, tmp_path / "a", EVERY[:1], target_modules="all-linear")
    assert (
        "nothing for 13 of the 14 layers" in line
        and line.count("model.layers") == 4
        and "and 9 more." in line
    )


@pytest.mark.parametrize(
    "config", [{"target_modules": ["q_proj"], "layers_to_transform": 1}, {"target_modules": ["layers.1.self_attn.q_proj"]},
               {"target_modules": None}],
)  # fmt: skip
def test_layers_that_were_not_to_be_updated_are_said(config, base, tmp_path):
    (line,) = described(base, tmp_path / "a", [EVERY[2]], **config)
    assert (
        "updates some layers alone" in line
        and "of the 2 called q_proj, 1 have no update: " + EVERY[0] in line
    )


def test_an_expression_that_is_none(base, tmp_path):
    with pytest.raises(
        UserError, match=r"adapter_config\.json names layers by what cannot be used: '\(q_proj' is no"
    ):
        described(base, tmp_path / "a", EVERY, target_modules="(q_proj")


def test_modules_trained_whole_are_promised_too(base, tmp_path):
    given = {
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["embed_tokens", "lm_head", "classifier"],
    }
    (line,) = described(base, tmp_path / "a", EVERY, whole=["lm_head.weight"], **given)
    assert "nothing for 1 of the 6 layers" in line and "names: model.embed_tokens." in line
    whole = ["lm_head.weight", "model.embed_tokens.weight"]
    assert described(base, tmp_path / "b", EVERY, whole=whole, **given) == []


@pytest.mark.parametrize(
    ("name", "layer", "target"),
    [
        ("opt", "model.decoder.layers.{}.fc1", "fc1"),
        ("bloom", "transformer.h.{}.self_attention.query_key_value", "query_key_value"),
        ("qwen", "transformer.h.{}.attn.c_attn", "c_attn"),
        ("chatglm2", "transformer.encoder.layers.{}.mlp.dense_h_to_4h", "dense_h_to_4h"),
    ],
)
def test_names_of_other_families(name, layer, target, tmp_path):
    own = write_base(tmp_path / "base", name, hugging_face=True)
    both = [layer.format(0), layer.format(1)]
    assert described(own, tmp_path / "a", both, name, target_modules=[target]) == []
    (line,) = described(own, tmp_path / "b", both[1:], name, target_modules=[target])
    assert f"1 of the 2 layers that its adapter_config.json names: {both[0]}." in line


def test_the_commands_say_so(base, tmp_path, capsys):
    write_peft(tmp_path / "a", base, dict.fromkeys(EVERY[:3], (4, 1.5)), target_modules=["q_proj", "v_proj"])
    merge(MergeOptions(base, (tmp_path / "a",), tmp_path / "merged"))
    assert (
        f"has nothing for 1 of the 4 layers that its adapter_config.json names: {EVERY[3]}"
        in capsys.readouterr().out
    )
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    plan = plan_model(ModelOptions(model_name_or_path=str(base), lora_path=tmp_path / "a"))
    assert len(plan.notes) == 2 and "has nothing for 1 of the 4 layers" in plan.notes[1]


def test_an_adapter_without_tensors_is_refused(base, tmp_path):
    write_peft(tmp_path / "a", base, {})
    with pytest.raises(UserError, match="holds no tensors, so it changes nothing"):
        merge(MergeOptions(base, (tmp_path / "a",), tmp_path / "merged"))


@pytest.mark.parametrize("joined", [False, True])
def test_one_in_paddlenlps_form_is_whole_or_refused(joined, tmp_path):
    own = write_base(tmp_path / "base", "llama")
    overrides = {"fuse_attention_qkv": True} if joined else None
    write_adapter(tmp_path / "a", own, overrides=overrides, lora_target_modules=["all"])
    merge(MergeOptions(own, (tmp_path / "a",), tmp_path / "merged"))
    path = tmp_path / "a" / "peft_model-00001-of-00001.safetensors"
    tensors = load_file(path)
    layer = "llama.layers.1.mlp.up_proj"
    kept = {
        name: np.ascontiguousarray(value) for name, value in tensors.items() if not name.startswith(layer)
    }
    save_file(kept, path, metadata={"format": "np"})
    index = path.with_name("peft_model.safetensors.index.json")
    content = json.loads(index.read_text())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if name in kept}
    index.write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=rf"lacks updates of 1 of the {8 if joined else 14} layers.*{layer}\. Copy"
    ):
        merge(MergeOptions(own, (tmp_path / "a",), tmp_path / "other"))
