"""PyTorch's `.bin` files, written here byte by byte as `torch.save` lays them out, and by PyTorch where it is."""

from __future__ import annotations

import collections
import importlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.errors import UserError
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.storage.checkpoints import Checkpoint
from finetune.storage.dtypes import as_float32
from finetune.storage.torch_files import read_torch_file
from tests.storage.torch_writing import save_bin


def _module(name: str) -> Any:
    """A package that not every environment has; the test is skipped without it unless it is required."""
    required = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
    return importlib.import_module(name) if required else pytest.importorskip(name)


def test_values_types_and_views(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    half = np.array([1.5, -2.0], np.float16)
    bits = (np.array([1.0, -2.5, 3.140625], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    save_bin(
        path, {"plain": numbers, "transposed": numbers.T, "half": half, "brain": bits, "one": np.array(7)}
    )
    tensors = read_torch_file(path)
    assert tensors["transposed"].shape == (3, 2)
    assert tensors["transposed"].strides == (4, 12)
    np.testing.assert_array_equal(tensors["plain"].read(), numbers)
    np.testing.assert_array_equal(tensors["transposed"].read(), numbers.T)
    np.testing.assert_array_equal(tensors["half"].read(), half)
    np.testing.assert_array_equal(as_float32(tensors["brain"].read()), [1.0, -2.5, 3.140625])
    assert tensors["one"].read() == 7
    assert isinstance(tensors["plain"].read(), np.memmap)  # nothing is read before it is used


@pytest.mark.parity
def test_files_of_pytorch_itself(tmp_path):
    torch = _module("torch")
    base = torch.arange(24, dtype=torch.float32)
    stored = collections.OrderedDict(
        whole=base.reshape(4, 6),
        columns=base.reshape(4, 6)[:, 1:3],
        turned=base.reshape(2, 3, 4).permute(2, 0, 1),
        tail=base[20:],
        half=torch.randn(5).half(),
        brain=torch.randn(3, 2).bfloat16(),
        trained=torch.nn.Parameter(torch.randn(2, 2)),
        empty=torch.zeros(0, 4),
        scalar=torch.tensor(2.5),
        expanded=torch.ones(1, 3).expand(2, 3),
    )
    torch.save(stored, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.format == "pt"
    assert checkpoint.names == {name: tuple(value.shape) for name, value in stored.items()}
    for name, value in stored.items():
        np.testing.assert_array_equal(
            as_float32(checkpoint.read(name)), value.detach().float().numpy(), err_msg=name
        )
    torch.save(stored, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"no zip archive.*before PyTorch 1\.6"):
        Checkpoint(tmp_path)


@pytest.mark.parity
def test_a_state_of_modules_is_read(tmp_path):
    torch = _module("torch")
    layer = torch.nn.Linear(2, 3)
    torch.save(layer.state_dict(), tmp_path / "pytorch_model.bin")
    assert Checkpoint(tmp_path).names == {"weight": (3, 2), "bias": (3,)}


def _hugging_face(source: Path, target: Path) -> dict[str, np.ndarray]:
    """Config and tensors of the same Llama as transformers would store it."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    return {
        name.replace("llama.", "model."): array.T if array.ndim == 2 and "embed" not in name else array
        for name, array in load_file(source / "model.safetensors").items()
    }


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_a_model_from_bin_files(tiny_llama, tmp_path, sharded):
    folder = tmp_path / "hf"
    tensors = _hugging_face(tiny_llama, folder)
    if sharded:
        shards = {"one.bin": sorted(tensors)[:7], "two.bin": sorted(tensors)[7:]}
        index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        shards = {"pytorch_model.bin": list(tensors)}
    for file, names in shards.items():
        save_bin(folder / file, {name: tensors[name] for name in names})
    loaded = load_model(resolve_model(folder), dtype="float32").state_dict()
    for name, parameter in load_model(resolve_model(tiny_llama), dtype="float32").state_dict().items():
        np.testing.assert_array_equal(loaded[name].numpy(), parameter.numpy())


def test_code_is_refused_by_name(tmp_path):
    class RunsCode:
        def __reduce__(self):
            return (eval, ("1 + 1",))

    _archive(tmp_path / "pytorch_model.bin", pickle.dumps({"a": RunsCode()}, 2))
    with pytest.raises(UserError, match=r"is refused: it contains \w+\.eval, which could run code"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["torch._utils _rebuild_sparse_tensor", "torch load", "os system"])
def test_other_objects_of_pytorch_are_refused(tmp_path, name):
    module, attribute = name.split()
    _archive(tmp_path / "pytorch_model.bin", f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(UserError, match=f"it contains {module}.{attribute}"):
        Checkpoint(tmp_path)


def test_attributes_of_tensors_cannot_be_set(tmp_path):
    """A pickle may try to point a tensor at another file."""
    path = tmp_path / "pytorch_model.bin"
    save_bin(path, {"a": np.zeros(2, np.float32)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    tensor = members["archive/data.pkl"].rpartition(b"s.")[0]
    for state in (b"}X\x04\x00\x00\x00pathX\x04\x00\x00\x00evils", b"N}X\x04\x00\x00\x00pathNs\x86"):
        _archive(path, tensor + state + b"bs.", {"archive/data/0": members["archive/data/0"]})
        with pytest.raises(UserError, match="is refused: it sets the state of a StoredArray"):
            read_torch_file(path)


def test_a_cut_file(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    save_bin(path, {"a": np.zeros(1000, np.float32)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="no zip archive: it is cut short"):
        Checkpoint(tmp_path)


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    save_bin(path, {"a": np.zeros(1000, np.float32)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="it is compressed"):
        Checkpoint(tmp_path)


def test_a_tensor_may_not_reach_outside_its_storage(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    save_bin(path, {"a": np.zeros(4, np.float32)}, claimed_shape=(5,))
    with pytest.raises(UserError, match=r"shape \[5\] reaches outside its storage"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds a list, not tensors"), ({"model": {"a": 1}}, "tensors inside 'model', not at the top")],
)
def test_other_contents(tmp_path, content, message):
    _archive(tmp_path / "pytorch_model.bin", pickle.dumps(content, 2))
    with pytest.raises(UserError, match=message):
        Checkpoint(tmp_path)


def _archive(path: Path, data: bytes, members: dict[str, bytes] | None = None) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {"archive/data.pkl": data, **(members or {})}.items():
            archive.writestr(name, content)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "bloom", "opt"])
def test_folders_of_transformers(tmp_path, family, dtype):
    """Shards of half precision give exactly what safetensors of the same model give."""
    torch, transformers = _module("torch"), _module("transformers")
    sizes = {"vocab_size": 96, "hidden_size": 32}
    config = {
        "llama": lambda: transformers.LlamaConfig(
            **sizes,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
        ),
        "bloom": lambda: transformers.BloomConfig(**sizes, n_layer=2, n_head=4),
        "opt": lambda: transformers.OPTConfig(
            **sizes, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
        ),
    }[family]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "bin", safe_serialization=False, max_shard_size="20KB")
    model.save_pretrained(tmp_path / "safetensors")
    assert len(list((tmp_path / "bin").glob("pytorch_model-*.bin"))) > 1
    loaded, expected = (
        load_model(resolve_model(tmp_path / kind), dtype="float32").state_dict()
        for kind in ("bin", "safetensors")
    )
    assert loaded.keys() == expected.keys()
    for name, parameter in expected.items():
        np.testing.assert_array_equal(loaded[name].numpy(), parameter.numpy(), err_msg=name)
