"""Optimizer state and adapters saved under one layout are read under any other; ranks are threads here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle.base import framework
from paddle.base.framework import EagerParamBase
from paddle.utils import unique_name
from safetensors.numpy import save_file

from finetune.adapters.files import load_adapter_weights, save_adapter
from finetune.checkpoints.optimizer_state import OPTIMIZER_FILES, load_optimizer, save_optimizer
from finetune.checkpoints.writers import RankFileWriter, WholeTensorWriter
from finetune.errors import UserError
from finetune.families.family import get_family, import_object
from finetune.families.tensor_splits import find_split
from finetune.parallel.sharding.fleet_stage1 import OwnedReplicas
from finetune.parallel.sharding.replicas import Replicas
from finetune.parallel.sharding.sliced_replicas import SlicedGradientReplicas
from finetune.processes.groups import ProcessGroups
from finetune.processes.layout import Layout
from finetune.storage.checkpoints import TensorFiles
from tests.checkpoints.test_tensors_of_ranks import SHAPE
from tests.processes.thread_groups import run_ranks

FAMILY = get_family("chatglm2")
LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(sharding=2),
    Layout(tensor=2, sharding=2),
    Layout(pipeline=2, tensor=2),
    Layout(data=2, tensor=2),
]
KINDS = (OwnedReplicas, SlicedGradientReplicas)  # stages 1 and 2: whole parameters and slices of them
RANK = 3  # of the low-rank matrices


def _config(layout: Layout, tensor_rank: int = 0):
    adapted = FAMILY.adapt_config(FAMILY.tiny.config(SHAPE))
    config = import_object(FAMILY.model_class).config_class.from_dict(adapted)
    config.tensor_parallel_degree, config.tensor_parallel_rank = layout.tensor, tensor_rank
    return config


def _wholes(adapter: bool) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    shapes = {name: spec.shape for name, spec in FAMILY.tiny.weights(SHAPE).items()}
    if adapter:
        layers = {
            name.removesuffix(".weight"): shape for name, shape in shapes.items() if ".encoder.layers" in name
        }
        shapes = {}
        for layer, shape in layers.items():
            if len(shape) == 2:
                shapes |= {f"{layer}.lora_A": (shape[0], RANK), f"{layer}.lora_B": (RANK, shape[1])}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _stage_of(name: str) -> int:
    return 0 if "layers.0." in name or "embedding" in name else 1


class RankModel:
    """Parameters of one rank."""

    def __init__(
        self,
        groups: ProcessGroups,
        wholes: dict[str, np.ndarray],
        *,
        fill: bool = True,
        dtype: str = "float32",
    ):
        place, layout = groups.coordinates, groups.layout
        self.config = _config(layout, place.tensor)
        self.named: dict[str, paddle.Tensor] = {}
        for name, whole in wholes.items():
            if layout.pipeline > 1 and _stage_of(name) != place.pipeline:
                continue
            split = find_split(FAMILY, name, self.config, degree=layout.tensor)
            part = split.part(whole, layout.tensor, place.tensor) if split else whole
            self.named[name] = _parameter(part if fill else np.zeros_like(part), dtype)

    def named_parameters(self):
        return list(self.named.items())

    def parameters(self):
        return list(self.named.values())

    def sublayers(self, include_self=False):
        return []

    def register_forward_pre_hook(self, hook):
        """It has no forward."""

    def state_dict(self):
        return dict(self.named)


def _parameter(array: np.ndarray, dtype: str):
    parameter = EagerParamBase(shape=array.shape, dtype=dtype, name=unique_name.generate("linear.w"))
    paddle.to_tensor(np.ascontiguousarray(array)).astype(dtype)._share_buffer_to(parameter)
    return parameter


def _replicas(model: RankModel, groups: ProcessGroups, kind: type[Replicas]) -> Replicas:
    """What updates the model, with a count of how often updates were shared out."""
    if groups.sharding.size == 1:
        kind = Replicas
    replicas = kind(model, groups)
    replicas.updates = 0
    share = replicas.share_updated

    def count_and_share() -> None:
        replicas.updates += 1
        share()

    replicas.share_updated = count_and_share
    return replicas


def _updated(replicas: Replicas) -> dict[str, paddle.Tensor]:
    """What this rank updates, by the parameter's name."""
    names = replicas.tensor_names()
    return {names[each.name]: each for each in replicas.optimizer_parameters() if each.name in names}


def _optimizer(replicas: Replicas, *, multi_precision: bool = True):
    """Paddle's own."""
    return paddle.optimizer.AdamW(
        0.1, parameters=list(_updated(replicas).values()), multi_precision=multi_precision
    )


def _expected(replicas: Replicas, *, masters: bool) -> dict[str, np.ndarray]:
    """State that follows from the weights, so that every rank can tell what it must find."""
    state: dict[str, np.ndarray] = {}
    for name in _updated(replicas):
        whole = replicas.trained[name].astype("float32")
        state[f"{name}/moment1_0"] = replicas.slice_of(name, 2 * whole).numpy()
        state[f"{name}/moment2_0"] = replicas.slice_of(name, 2 * whole**2).numpy()
        state[f"{name}/beta1_pow_acc_0"] = np.array([0.25], np.float32)
        state[f"{name}/beta2_pow_acc_0"] = np.array([0.5], np.float32)
        if masters:
            state[f"{name}/master_weight"] = replicas.slice_of(name, whole + 2**-20).numpy()
    return state


def _found(optimizer, replicas: Replicas) -> dict[str, paddle.Tensor]:
    """What Paddle's optimizer keeps, looked up as its own step looks it up."""
    state = {}
    for name, each in _updated(replicas).items():
        for accumulator in ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc"):
            state[f"{name}/{accumulator}_0"] = optimizer._get_accumulator_master(accumulator, each)
        if each.dtype != paddle.float32:
            state[f"{name}/master_weight"] = optimizer._master_weights[each.name]
    return state


def _writer(groups: ProcessGroups, unified: bool):
    return WholeTensorWriter(groups) if unified else RankFileWriter(groups)


def _save(
    folder: Path,
    layout: Layout,
    wholes,
    *,
    unified: bool,
    dtype: str = "float32",
    kind: type[Replicas] = OwnedReplicas,
) -> None:
    def work(groups):
        model = RankModel(groups, wholes, dtype=dtype)
        replicas = _replicas(model, groups, kind)
        optimizer = _optimizer(replicas)
        block = framework.default_main_program().global_block()
        optimizer._create_accumulators(block, optimizer._parameter_list)
        expected = _expected(replicas, masters=dtype != "float32")
        for key, tensor in _found(optimizer, replicas).items():
            tensor.set_value(expected[key])
        save_optimizer(folder, model, optimizer, _writer(groups, unified), replicas=replicas)

    assert run_ranks(layout, work) == [None] * layout.world


def _check(
    folder: Path, layout: Layout, wholes, *, dtype: str = "float32", kind: type[Replicas] = OwnedReplicas
) -> None:
    def work(groups):
        model = RankModel(groups, wholes, dtype=dtype)
        replicas = _replicas(model, groups, kind)
        optimizer = _optimizer(replicas)
        before = {name: each.astype("float32").numpy() for name, each in model.named.items()}
        load_optimizer(folder, model, optimizer, replicas=replicas, is_stage=layout.pipeline > 1)
        found, expected = _found(optimizer, replicas), _expected(replicas, masters=dtype != "float32")
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert tensor.dtype == paddle.float32
            np.testing.assert_array_equal(tensor.numpy(), expected[key], err_msg=key)
        assert replicas.updates == (dtype != "float32")
        for name, each in model.named.items():
            np.testing.assert_array_equal(each.astype("float32").numpy(), before[name], err_msg=name)

    results = run_ranks(layout, work)
    assert results == [None] * layout.world


@pytest.mark.parametrize(
    ("source", "unified", "kind"),
    [
        *((layout, True, OwnedReplicas) for layout in LAYOUTS),
        *((layout, True, SlicedGradientReplicas) for layout in LAYOUTS if layout.sharding > 1),
        *((LAYOUTS[4], False, kind) for kind in KINDS),
        (LAYOUTS[5], False, OwnedReplicas),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_goes_from_any_layout_to_any(tmp_path, source, unified, kind, dtype):
    wholes = _wholes(adapter=False)
    _save(tmp_path, source, wholes, unified=unified, dtype=dtype, kind=kind)
    files = "optimizer*.safetensors" if unified else "optimizer*.pdopt"
    expected = source.pipeline * (1 if unified else source.tensor)
    assert len(list(tmp_path.glob(files))) == expected
    for target in LAYOUTS:
        for kind_there in KINDS if target.sharding > 1 else KINDS[:1]:
            _check(tmp_path, target, wholes, dtype=dtype, kind=kind_there)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_names_in_the_file_are_those_of_a_float32_run_and_master_weights(tmp_path, dtype):
    wholes = _wholes(adapter=False)
    _save(tmp_path, Layout(), wholes, unified=True, dtype=dtype)
    files = TensorFiles([tmp_path / OPTIMIZER_FILES.file_name])
    kinds = ("beta1_pow_acc_0", "beta2_pow_acc_0", "master_weight", "moment1_0", "moment2_0")
    assert sorted(files.names) == sorted(f"{name}/{kind}" for name in wholes for kind in kinds)
    assert {files.read(name).dtype for name in files.names} == {np.dtype("float32")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [Layout(), Layout(sharding=2), Layout(data=2, sharding=2)], ids=str)
def test_a_float32_run_continues_from_the_master_weights_of_a_half_precision_run(tmp_path, layout, kind):
    wholes = _wholes(adapter=False)
    _save(tmp_path, Layout(tensor=2), wholes, unified=True, dtype="bfloat16")

    def work(groups):
        model = RankModel(groups, wholes)
        replicas = _replicas(model, groups, kind)
        load_optimizer(tmp_path, model, _optimizer(replicas), replicas=replicas)
        assert replicas.updates == 1
        for name, each in model.named.items():
            rounded = paddle.to_tensor(wholes[name]).astype("bfloat16").astype("float32").numpy()
            np.testing.assert_array_equal(each.numpy(), rounded + np.float32(2**-20), err_msg=name)

    assert run_ranks(layout, work) == [None] * layout.world


def test_half_precision_refuses_a_checkpoint_without_master_weights(tmp_path):
    wholes = _wholes(adapter=False)
    _save(tmp_path, Layout(), wholes, unified=True)
    model = RankModel(ProcessGroups(), wholes, dtype="bfloat16")
    replicas = Replicas(model, ProcessGroups())
    with pytest.raises(UserError, match="holds no master weights, so fp16_opt_level O2 cannot continue it"):
        load_optimizer(tmp_path, model, _optimizer(replicas), replicas=replicas)


def test_master_weights_in_files_of_their_own_are_read(tmp_path):
    """As PaddleNLP's unified checkpoints keep them."""
    wholes = _wholes(adapter=False)
    (tmp_path / "ours").mkdir()
    _save(tmp_path / "ours", Layout(), wholes, unified=True, dtype="bfloat16")
    files = TensorFiles([tmp_path / "ours" / OPTIMIZER_FILES.file_name])
    groups: dict[str, dict[str, np.ndarray]] = {"optimizer": {}, "master_weights": {}}
    for key in files.names:
        name, _, accumulator = key.rpartition("/")
        is_master = accumulator == "master_weight"
        groups["master_weights" if is_master else "optimizer"][name if is_master else key] = files.read(key)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for stem, tensors in groups.items():
        file = f"{stem}-00001-of-00001.safetensors"
        save_file({key: np.array(array) for key, array in tensors.items()}, theirs / file)
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, file)}
        (theirs / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for target in (Layout(), Layout(tensor=2, sharding=2)):
        _check(theirs, target, wholes, dtype="bfloat16")


def test_a_second_optimizer_of_the_same_parameters_writes_the_same_names(tmp_path):
    """Paddle numbers the accumulators that a process makes under one name."""
    wholes = _wholes(adapter=False)
    model = RankModel(ProcessGroups(), wholes)
    replicas = Replicas(model, ProcessGroups())
    parameters = replicas.optimizer_parameters()
    names = []
    for attempt in ("first", "second"):
        optimizer = paddle.optimizer.AdamW(0.1, parameters=parameters)
        for parameter in parameters:
            parameter.grad = paddle.ones_like(parameter)
        optimizer.step()
        folder = tmp_path / attempt
        folder.mkdir()
        save_optimizer(folder, model, optimizer, WholeTensorWriter(), replicas=replicas)
        names.append(sorted(TensorFiles([folder / OPTIMIZER_FILES.file_name]).names))
    assert names[0] == names[1]


def test_state_of_another_model_is_refused(tmp_path):
    wholes = _wholes(adapter=False)
    _save(tmp_path, Layout(), wholes, unified=True)
    wholes.pop("chatglm_v2.output_layer.weight")
    model = RankModel(ProcessGroups(), wholes)
    replicas = Replicas(model, ProcessGroups())
    with pytest.raises(RuntimeError, match=r"unknown parameters: \['chatglm_v2\.output_layer\.weight'\]"):
        load_optimizer(tmp_path, model, _optimizer(replicas), replicas=replicas)


def _adapter(groups: ProcessGroups, wholes, *, fill: bool = True):
    from paddlenlp.peft import LoRAConfig

    config = LoRAConfig(target_modules=[".*"], r=RANK, tensor_parallel_degree=groups.layout.tensor)
    return SimpleNamespace(model=RankModel(groups, wholes, fill=fill), lora_config=config)


@pytest.mark.parametrize("unified", [True, False], ids=["whole", "shards"])
@pytest.mark.parametrize("source", [Layout(), Layout(tensor=2), Layout(pipeline=2, tensor=2)], ids=str)
def test_adapters_go_from_any_layout_to_any(tmp_path, source, unified):
    wholes = _wholes(adapter=True)
    results = run_ranks(
        source, lambda groups: save_adapter(_adapter(groups, wholes), tmp_path, _writer(groups, unified))
    )
    assert results == [None] * source.world

    def check(groups):
        expected, found = _adapter(groups, wholes), _adapter(groups, wholes, fill=False)
        load_adapter_weights(found, tmp_path, is_stage=groups.layout.pipeline > 1)
        for name, tensor in found.model.named.items():
            np.testing.assert_array_equal(tensor.numpy(), expected.model.named[name].numpy(), err_msg=name)

    for target in (Layout(), Layout(tensor=2), Layout(tensor=4), Layout(pipeline=2, tensor=2)):
        assert run_ranks(target, check) == [None] * target.world
    if unified:
        assert '"tensor_parallel_degree": 2' not in (tmp_path / "lora_config.json").read_text()


def test_an_adapter_of_another_rank_is_refused(tmp_path):
    wholes = _wholes(adapter=True)
    save_adapter(_adapter(ProcessGroups(), wholes), tmp_path)
    name = next(name for name in wholes if name.endswith("lora_A"))
    wholes[name] = wholes[name][:, :2]

    def work(groups):
        load_adapter_weights(_adapter(groups, wholes), tmp_path)

    for result in run_ranks(Layout(tensor=2), work):
        assert isinstance(result, UserError)
        assert f"{name} has shape [64, 3], the model needs [64, 2]" in str(result)
