"""Models and data sets by name, from a loopback hub that speaks the hubs' protocols, caches and faults included."""

from __future__ import annotations

import json
import os
import shutil
import socket

import numpy as np
import pytest

from finetune.data.reading.source import find_split
from finetune.errors import UserError
from finetune.models.hubs import reach
from finetune.models.hubs.repository import candidates
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.loading import load_tokenizer
from tests.merge.lora_writing import logits
from tests.models.hub_server import closed_port

NAME = "someone/tiny-llama"
HUBS = ("hf", "modelscope", "aistudio")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny("llama", tmp_path_factory.mktemp("hub") / "model", num_layers=2)


@pytest.mark.parametrize("scheme", HUBS)
def test_a_model_by_name_is_the_folder_that_was_served(scheme, hub, model):
    hub.models[NAME] = model
    resolved = resolve_model(f"{scheme}://{NAME}")
    assert resolved.family.name == "llama" and hub.downloads()[0] == "config.json"
    assert not any(name.endswith(".safetensors") for name in hub.downloads()), (
        "weights only when they are needed"
    )
    loaded = load_model(resolved, dtype="float32")
    ours = load_model(resolve_model(model), dtype="float32")
    np.testing.assert_array_equal(logits(loaded), logits(ours))
    tokenizer = load_tokenizer(f"{scheme}://{NAME}")
    assert tokenizer("今天 a")["input_ids"] == load_tokenizer(model)("今天 a")["input_ids"]
    asked = len(hub.asked)
    assert resolve_model(f"{scheme}://{NAME}").remote is None
    load_model(resolve_model(f"{scheme}://{NAME}"), dtype="float32")
    assert len(hub.asked) == asked, "what is in the cache is not asked for again"


def test_a_bare_name_is_looked_for_everywhere(hub, model, monkeypatch):
    hub.models[NAME] = model
    assert str(resolve_model(NAME).remote).startswith(f"hf://{NAME}@")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    shutil.rmtree(os.environ["HF_HOME"])
    assert str(resolve_model(NAME).remote) == f"modelscope://{NAME}"


@pytest.mark.parametrize("scheme", HUBS)
def test_revisions(scheme, hub, model):
    hub.models[NAME] = model
    assert resolve_model(f"{scheme}://{NAME}@v1").family.name == "llama"
    with pytest.raises(UserError, match=r"no such revision|has no model"):
        resolve_model(f"{scheme}://{NAME}@v2")


@pytest.mark.parametrize("scheme", HUBS)
def test_a_family_that_is_not_covered_costs_one_file(scheme, hub, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"model_type": "stablelm", "architectures": ["StableLmForCausalLM"]})
    )
    hub.models[NAME] = other
    with pytest.raises(UserError, match=r"is not supported: no family covers model_type 'stablelm'"):
        resolve_model(f"{scheme}://{NAME}")
    assert set(hub.downloads()) == {"config.json"}


def test_shards_and_the_form_that_is_preferred(hub, model, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "shards"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file, metadata={"format": "np"})
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    hub.models[NAME] = folder
    loaded = load_model(resolve_model(f"hf://{NAME}"), dtype="float32")
    np.testing.assert_array_equal(logits(loaded), logits(load_model(resolve_model(model), dtype="float32")))
    assert "pytorch_model.bin" not in hub.downloads()


@pytest.mark.parametrize("scheme", HUBS)
def test_what_a_hub_does_not_have(scheme, hub, model, tmp_path):
    with pytest.raises(
        UserError, match=rf"is no local folder, and .*has no model {scheme}://{NAME}.*Either: \(1\)"
    ):
        resolve_model(f"{scheme}://{NAME}")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    (bare / "model.gguf").write_bytes(b"x")
    hub.models[NAME] = bare
    with pytest.raises(
        UserError, match=r"has no weights that can be read here .*it holds config\.json; model\.gguf"
    ):
        load_model(resolve_model(f"{scheme}://{NAME}"), dtype="float32")
    (bare / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json.*it holds model\.gguf"):
        resolve_model(f"{scheme}://{NAME}@v1")


def test_a_model_that_needs_consent(hub, model):
    hub.models[NAME] = model
    hub.gated.add(NAME)
    with pytest.raises(UserError, match=r"its owner asks for consent first.*HF_TOKEN"):
        resolve_model(f"hf://{NAME}")


def test_offline_nothing_is_asked(hub, model, monkeypatch):
    hub.models[NAME] = model
    load_model(resolve_model(f"hf://{NAME}"), dtype="float32")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.asked)
    assert resolve_model(NAME).folder is not None
    with pytest.raises(UserError, match=r"Hugging Face is not asked \(HF_HUB_OFFLINE\)"):
        resolve_model("someone/else")
    assert len(hub.asked) == asked


def test_a_damaged_file_is_not_kept(hub, model):
    hub.models[NAME] = model
    hub.damaged.add("tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer\.model of .* arrived damaged from ModelScope"):
        resolve_model(f"modelscope://{NAME}")
    hub.damaged.clear()
    assert resolve_model(f"modelscope://{NAME}").family.name == "llama"


@pytest.mark.parametrize("scheme", HUBS[:2])
def test_a_data_set_by_name(scheme, hub, tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    (served / "train.json").write_text('{"src": "a", "tgt": "b"}\n')
    (served / "dev.jsonl").write_text('{"src": "c", "tgt": "d"}\n')
    (served / "README.md").write_text("# no data")
    hub.datasets["someone/pairs"] = served
    (train,) = find_split(f"{scheme}://someone/pairs", "train")
    assert train.read_text() == (served / "train.json").read_text()
    assert find_split("someone/pairs", "dev")[0].name == "dev.jsonl"
    assert "README.md" not in hub.downloads()
    asked = len(hub.asked)
    find_split(f"{scheme}://someone/pairs", "train")
    assert len(hub.asked) == asked
    train.unlink()  # as after a download that was broken off
    assert find_split(f"{scheme}://someone/pairs", "train")[0].is_file()
    with pytest.raises(
        UserError, match=r"nobody/nothing is neither a file nor a folder here, and Hugging Face"
    ):
        find_split("nobody/nothing", "train")


@pytest.mark.parametrize("name", ["", "llama", "./a/b", "/a/b", "a/b/c", "hf://a", "a b/c"])
def test_what_is_no_name(name):
    assert candidates(name) == []


def test_a_hub_that_is_not_known():
    with pytest.raises(
        UserError, match=r"there is no hub 'github'; there are hf://, modelscope://, aistudio://"
    ):
        candidates("github://a/b")


def test_a_local_folder_asks_nobody(model, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", fail)
    monkeypatch.setattr(reach, "is_reachable", fail)
    load_model(resolve_model(model), dtype="float32")
    load_tokenizer(model)
