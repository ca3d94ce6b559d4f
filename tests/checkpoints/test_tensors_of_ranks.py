"""Checkpoints of several ranks hold what one process would write; ranks are threads here."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from finetune.checkpoints.folder import find_fault, write_checkpoint
from finetune.checkpoints.model_weights import save_model_weights
from finetune.checkpoints.tensors_of_ranks import family_of
from finetune.checkpoints.writers import RankFileWriter, WholeTensorWriter
from finetune.errors import UserError
from finetune.families.family import find_family, get_family
from finetune.families.tensor_splits import find_split
from finetune.families.tiny_recipe import TinyShape
from finetune.models.loading import load_model, load_weights, open_checkpoint
from finetune.models.resolve import resolve_model
from finetune.models.shard_files import open_shards
from finetune.processes.groups import ProcessGroups
from finetune.processes.joint_steps import RankFailed
from finetune.processes.layout import Layout
from finetune.run.directory import check_shared_folder
from finetune.storage.checkpoints import Checkpoint
from tests.processes.thread_groups import run_ranks

FAMILIES = ["llama", "gemma", "bloom", "opt", "qwen", "chatglm2"]
SHAPE = TinyShape(
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=40,
    max_length=16,
)


def write_tiny(name: str, folder: Path) -> Path:
    """A checkpoint without a tokenizer."""
    recipe = get_family(name).tiny
    shape = replace(SHAPE, intermediate_size=SHAPE.hidden_size * (recipe.inner_ratio or 2))
    generator = np.random.default_rng(0)
    weights = {
        key: generator.normal(size=spec.shape).astype(np.float32)
        for key, spec in recipe.weights(shape).items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(recipe.config(shape)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "np"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny(name, root / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def models(folders):
    return {name: load_model(resolve_model(folder), dtype="float32") for name, folder in folders.items()}


class Part:
    """What a rank of a layout holds of a model, without a model that computes."""

    def __init__(self, model, groups: ProcessGroups):
        self.config = copy.deepcopy(model.config)
        self.config.tensor_parallel_degree = groups.layout.tensor
        self.config.tensor_parallel_rank = groups.coordinates.tensor
        self.config.sequence_parallel = True
        self._keys_to_ignore_on_save = model._keys_to_ignore_on_save
        self.generation_config, self.can_generate = model.generation_config, model.can_generate
        self.__class__ = type(type(model).__name__, (Part,), {})
        state = model.state_dict()
        family = family_of(model.config)
        degree, rank = groups.layout.tensor, groups.coordinates.tensor
        made: dict[int, paddle.Tensor] = {}
        self._state = {}
        for name, tensor in state.items():
            if not _is_on_stage(name, groups):
                continue
            if id(tensor) not in made:
                split = find_split(family, name, self.config, degree=degree)
                array = tensor.numpy()
                array = split.part(array, degree, rank) if split else array
                made[id(tensor)] = paddle.to_tensor(np.ascontiguousarray(array)).astype(tensor.dtype)
            self._state[name] = made[id(tensor)]

    def state_dict(self):
        return dict(self._state)

    def parameters(self):
        return list(self._state.values())


def _is_on_stage(name: str, groups: ProcessGroups) -> bool:
    """Layer 0 on the first of two stages, layer 1 on the second; the tied embedding on both."""
    if groups.layout.pipeline == 1:
        return True
    for number in (0, 1):
        if f"layers.{number}." in name or f".h.{number}." in name:
            return groups.coordinates.pipeline == number
    return "word_embeddings.weight" in name or "embed" in name or groups.coordinates.pipeline == 1


def _read(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint(folder)
    return {name: np.array(checkpoint.read(name)) for name in checkpoint.names}


def _same(saved: dict[str, np.ndarray], model) -> None:
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, array in saved.items():
        assert array.dtype == state[name].dtype
        np.testing.assert_array_equal(array, state[name], err_msg=name)
    copies = {find_family(model.config.to_dict()).hugging_face.own_head} - {""}
    tensors = {id(tensor): name for name, tensor in model.state_dict().items()}
    assert len(saved) == len(tensors) + len(copies) and copies <= saved.keys()  # other tied ones once


@pytest.mark.parametrize("name", ["llama", "bloom", "chatglm2"])
def test_one_process_writes_what_paddlenlp_writes(models, tmp_path, name):
    model = models[name]
    model.save_pretrained(str(tmp_path / "theirs"), safe_serialization=True)
    (tmp_path / "ours").mkdir()
    save_model_weights(model, tmp_path / "ours", WholeTensorWriter())
    for theirs in sorted((tmp_path / "theirs").iterdir()):
        assert (tmp_path / "ours" / theirs.name).read_bytes() == theirs.read_bytes(), theirs.name
    assert len(list((tmp_path / "ours").iterdir())) == len(list((tmp_path / "theirs").iterdir()))


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2), Layout(pipeline=2), Layout(data=2, sharding=2), Layout(pipeline=2, tensor=2)]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_write_the_whole_model(models, folders, tmp_path, name, layout):
    model = models[name]
    results = run_ranks(
        layout, lambda groups: save_model_weights(Part(model, groups), tmp_path, WholeTensorWriter(groups))
    )
    assert results == [None] * layout.world
    _same(_read(tmp_path), model)
    assert len(list(tmp_path.glob("*.safetensors"))) == layout.pipeline
    (tmp_path / "one").mkdir()
    save_model_weights(model, tmp_path / "one", WholeTensorWriter())
    assert (tmp_path / "config.json").read_text() == (tmp_path / "one" / "config.json").read_text()
    again = load_model(resolve_model(tmp_path), dtype="float32")
    _same(_read(tmp_path), again)


def test_bfloat16_and_small_files(folders, tmp_path):
    model = load_model(resolve_model(folders["llama"]), dtype="bfloat16")
    layout = Layout(pipeline=2, tensor=2)
    results = run_ranks(
        layout,
        lambda groups: save_model_weights(Part(model, groups), tmp_path, WholeTensorWriter(groups, 20_000)),
    )
    assert results == [None] * 4
    _same(_read(tmp_path), model)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 3
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in _read(tmp_path).values())


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2), Layout(pipeline=2, tensor=2)])
@pytest.mark.parametrize("name", ["llama", "qwen", "bloom"])
def test_files_of_each_rank_are_read_as_one_model(models, folders, tmp_path, name, layout):
    model = models[name]
    assert run_ranks(
        layout, lambda groups: save_model_weights(Part(model, groups), tmp_path, RankFileWriter(groups))
    ) == [None] * len(range(layout.world))
    family = family_of(model.config)
    shards = open_shards(tmp_path, family=family, config=family.adapt_config(model.config.to_dict()))
    assert (shards.tensor_degree, shards.pipeline_degree) == (layout.tensor, layout.pipeline)
    assert len(list(tmp_path.glob("model_state.*.pdparams"))) == layout.world
    saved = {key: np.array(shards.read(key)) for key in shards.names}
    assert {key: array.shape for key, array in saved.items()} == shards.names
    _same(saved, model)
    fresh = load_model(resolve_model(folders[name]), dtype="float32")
    for parameter in fresh.parameters():
        parameter.set_value(paddle.zeros_like(parameter))
    load_weights(fresh, tmp_path)
    _same(saved, fresh)
    _same(saved, load_model(resolve_model(tmp_path), dtype="float32"))


def test_paddle_reads_a_rank_s_file(models, tmp_path):
    layout = Layout(tensor=2)
    run_ranks(
        layout,
        lambda groups: save_model_weights(Part(models["llama"], groups), tmp_path, RankFileWriter(groups)),
    )
    state = paddle.load(str(tmp_path / "model_state.tp01.pdparams"))
    expected = models["llama"].state_dict()["llama.layers.0.mlp.gate_proj.weight"].numpy()
    part = state["llama.layers.0.mlp.gate_proj.weight"].numpy()
    np.testing.assert_array_equal(part, expected[:, expected.shape[1] // 2 :])


def test_faults_of_shards_are_told(models, tmp_path):
    layout = Layout(tensor=2)
    model = models["llama"]
    run_ranks(
        layout, lambda groups: save_model_weights(Part(model, groups), tmp_path, RankFileWriter(groups))
    )
    family = family_of(model.config)
    second = tmp_path / "model_state.tp01.pdparams"
    state = paddle.load(str(second))
    paddle.save({**state, "llama.norm.weight": paddle.zeros([3])}, str(second))
    with pytest.raises(
        UserError, match=r"tp01\.pdparams: llama\.norm\.weight has shape \[3\] \(float32\), but \[64\]"
    ):
        open_checkpoint(tmp_path, family, model.config.to_dict())
    state.pop("llama.norm.weight")
    paddle.save(state, str(second))
    with pytest.raises(UserError, match=r"hold different tensors \(llama\.norm\.weight\)"):
        open_checkpoint(tmp_path, family, model.config.to_dict())
    second.unlink()
    (tmp_path / "model_state.tp00.pdparams").rename(second)
    with pytest.raises(UserError, match=r"lacks model_state\.tp00\.pdparams.*Copy the missing files"):
        resolve_model(tmp_path)
    (tmp_path / "model_state.pp00.pdparams").touch()
    with pytest.raises(UserError, match="files of runs with different layouts"):
        open_checkpoint(tmp_path, family, model.config.to_dict())


def test_a_write_error_on_one_rank_fails_on_all(models, tmp_path, monkeypatch):
    from finetune.checkpoints import writers

    class FullDisk(writers.TensorWriter):
        def write(self, name, array):
            if "layers.1.mlp" in name:
                raise OSError(28, "No space left on device")
            super().write(name, array)

    monkeypatch.setattr(writers, "TensorWriter", FullDisk)
    layout = Layout(pipeline=2, tensor=2)

    def work(groups):
        model = Part(models["llama"], groups)
        write_checkpoint(
            tmp_path, 5, lambda folder: save_model_weights(model, folder, WholeTensorWriter(groups)), groups
        )

    results = run_ranks(layout, work)
    assert [type(result) for result in results] == [RankFailed, RankFailed, OSError, RankFailed]
    assert "rank 2 failed: OSError: [Errno 28] No space left on device" in str(results[0])
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_make_one_checkpoint(tmp_path):
    def work(groups):
        def write(folder):
            (folder / f"part-{groups.rank}").write_text(str(groups.rank))

        return write_checkpoint(tmp_path, 3, write, groups)

    results = run_ranks(Layout(data=3), work)
    assert results == [tmp_path / "checkpoint-3"] * 3
    assert find_fault(tmp_path / "checkpoint-3") is None
    manifest = json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["part-0", "part-1", "part-2"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_rank_that_raises_leaves_no_checkpoint(tmp_path):
    def work(groups):
        def write(folder):
            if groups.rank == 1:
                raise UserError("no")

        write_checkpoint(tmp_path, 3, write, groups)

    results = run_ranks(Layout(data=2), work)
    assert "rank 1 failed: UserError: no" in str(results[0]) and isinstance(results[1], UserError)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_of_each_host_is_told(tmp_path):
    def work(groups):
        check_shared_folder(tmp_path / ("a" if groups.rank < 2 else "b"), groups, seconds=0.3)

    results = run_ranks(Layout(data=3), work)
    assert all(isinstance(result, UserError) for result in results)
    assert "is not the same folder on all hosts" in str(results[0]) and "(rank 2)" in str(results[0])
    assert "storage that all hosts mount" in str(results[0])
    shared = run_ranks(Layout(data=3), lambda groups: check_shared_folder(tmp_path / "c", groups))
    assert shared == [None] * 3
    assert list((tmp_path / "c").iterdir()) == []


def test_ranks_with_different_tensors_do_not_begin(models, tmp_path):
    def work(groups):
        part = Part(models["llama"], groups)
        if groups.rank:
            part._state.pop("llama.norm.weight")
        save_model_weights(part, tmp_path, WholeTensorWriter(groups))

    results = run_ranks(Layout(tensor=2), work)
    assert all("hold different tensors: ['llama.norm.weight']" in str(result) for result in results)


def test_family_of_a_config_object(models):
    assert {name: family_of(model.config).name for name, model in models.items()} == {n: n for n in FAMILIES}
    with pytest.raises(UserError, match="no family covers"):
        family_of(SimpleNamespace(to_dict=lambda: {"model_type": "other"}))
