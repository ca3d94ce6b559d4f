"""Quantised folders from before config.json had a place for it: facts in a file beside it, weights under other names."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import UserError
from finetune.merge.lora import MergeOptions, merge
from finetune.models.loading import load_model
from finetune.models.quantised.layers import packed_layers
from finetune.models.resolve import resolve_model
from tests.merge.lora_writing import folder_logits, logits, write_adapter, write_base
from tests.quantised_folders import write_quantised

GPTQ = {
    "bits": 4,
    "group_size": 32,
    "damp_percent": 0.01,
    "desc_act": True,
    "sym": False,
    "true_sequential": True,
}
AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
USUAL = "gptq_model-4bit-32g"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> folder of today: GPTQ in act order, AWQ, and the model that both were made from."""
    root = tmp_path_factory.mktemp("old")
    plain = write_base(root / "plain", "llama", hugging_face=True)
    made = {
        kind: write_quantised(plain, root / kind.replace(" ", "-"), kind) for kind in ("gptq order", "awq")
    }
    return made | {"plain": plain}


def make_old(folder, out, side_file: str, facts: dict, weights: str = "model.safetensors"):
    """A folder as it was written before: nothing in config.json, `facts` beside it."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    (out / side_file).write_text(json.dumps(facts))
    (out / "model.safetensors").rename(out / weights)
    return out


def load(folder):
    return load_model(resolve_model(folder), dtype="float32", config_overrides={"use_cache": False})


@pytest.mark.parametrize(
    ("kind", "side_file", "facts", "weights"),
    [
        ("gptq order", "quantize_config.json", GPTQ, f"{USUAL}.safetensors"),
        ("gptq order", "quantize_config.json", GPTQ | {"model_file_base_name": "own"}, "own.safetensors"),
        ("gptq order", "quantize_config.json", GPTQ, "wizard-GPTQ-4bit-32g.act.order.safetensors"),
        ("awq", "quant_config.json", AWQ, "model.safetensors"),
    ],
)
def test_an_old_folder_is_that_of_today(folders, tmp_path, kind, side_file, facts, weights):
    model = load(make_old(folders[kind], tmp_path / "old", side_file, facts, weights))
    assert packed_layers(model)
    np.testing.assert_array_equal(logits(model), logits(load(folders[kind])))


def test_an_old_folder_in_shards(folders, tmp_path):
    old = make_old(folders["gptq order"], tmp_path / "old", "quantize_config.json", GPTQ)
    tensors = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"{USUAL}-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in some}, old / file, metadata={"format": "pt"})
        places |= dict.fromkeys(some, file)
    (old / f"{USUAL}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    np.testing.assert_array_equal(logits(load(old)), logits(load(folders["gptq order"])))


def test_what_is_merged_from_an_old_folder_is_an_ordinary_model(folders, tmp_path):
    old = make_old(
        folders["gptq order"], tmp_path / "old", "quantize_config.json", GPTQ, f"{USUAL}.safetensors"
    )
    expected = write_adapter(tmp_path / "adapter", old)
    merge(MergeOptions(old, (tmp_path / "adapter",), tmp_path / "out", into="dequantised", verify=True))
    assert resolve_model(tmp_path / "out").stored_format is None
    np.testing.assert_allclose(folder_logits(tmp_path / "out"), expected, atol=2e-2)


def test_an_old_folder_by_name(hub, folders, tmp_path):
    old = make_old(
        folders["gptq order"], tmp_path / "old", "quantize_config.json", GPTQ, f"{USUAL}.safetensors"
    )
    hub.models["someone/old-gptq"] = old
    resolved = resolve_model("hf://someone/old-gptq")
    assert resolved.stored_format and not any(name.endswith(".safetensors") for name in hub.downloads())
    np.testing.assert_array_equal(logits(load("hf://someone/old-gptq")), logits(load(old)))
    asked = len(hub.asked)
    load("hf://someone/old-gptq")
    assert len(hub.asked) == asked, "what is in the cache is not asked for again"


@pytest.mark.parametrize(
    ("kind", "facts", "weights", "message"),
    [
        (
            "gptq order",
            GPTQ | {"bits": 3},
            "model.safetensors",
            r"quantised \(quantize_config.json: gptq, 3 bits\)",
        ),
        ("gptq order", GPTQ | {"checkpoint_format": "marlin"}, "model.safetensors", "in the form 'marlin'"),
        ("gptq order", GPTQ, "model.pt", "under a name that is read here .it holds model.pt"),
        ("plain", GPTQ, "model.safetensors", "if they are ordinary weights, remove quantize_config.json"),
    ],
)
def test_what_is_not_read_is_named(folders, tmp_path, kind, facts, weights, message):
    old = make_old(folders[kind], tmp_path / "old", "quantize_config.json", facts, weights)
    with pytest.raises(UserError, match=message):
        load(old)


def test_several_files_are_not_chosen_from(folders, tmp_path):
    old = make_old(folders["gptq order"], tmp_path / "old", "quantize_config.json", GPTQ, "a.safetensors")
    shutil.copy(old / "a.safetensors", old / "b.safetensors")
    with pytest.raises(UserError, match=r"it holds a\.safetensors; b\.safetensors"):
        resolve_model(old)


def test_both_files_must_say_the_same(folders, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(folders["gptq order"], folder)
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ))
    assert packed_layers(load(folder))
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ | {"group_size": 128}))
    with pytest.raises(
        UserError, match=r"group_size is 32 in quantization_config of config\.json and 128 in"
    ):
        resolve_model(folder)


def test_other_tools_files_of_that_name_say_nothing(folders, tmp_path):
    facts = {"per_channel": True, "reduce_range": True, "per_model_config": {}}
    folder = make_old(folders["plain"], tmp_path / "folder", "quantize_config.json", facts)
    assert not packed_layers(load(folder))
