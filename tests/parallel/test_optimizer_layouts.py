"""Optimizer state and adapters saved under one layout are read under any other; ranks are threads here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from finetune.adapters.checkpoint import load_adapter_weights, save_adapter
from finetune.errors import UserError
from finetune.models.family import get_family, import_object
from finetune.models.tensor_splits import find_split
from finetune.parallel.groups import ProcessGroups
from finetune.parallel.layout import Layout
from finetune.training.optimizer_state import load_optimizer, save_optimizer
from tests.parallel.test_saving import SHAPE
from tests.parallel.thread_groups import run_ranks

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
RANK = 3  # of the low-rank matrices


def _config(layout: Layout, tensor_rank: int = 0, stage: int = 0):
    adapted = FAMILY.adapt_config(FAMILY.tiny.config(SHAPE))
    config = import_object(FAMILY.model_class).config_class.from_dict(adapted)
    config.tensor_parallel_degree, config.tensor_parallel_rank = layout.tensor, tensor_rank
    if layout.pipeline > 1:
        config.local_layers = [stage]
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
    """Parameters of one rank, with names that Paddle might have generated."""

    def __init__(self, groups: ProcessGroups, wholes: dict[str, np.ndarray], *, fill: bool = True):
        place, layout = groups.coordinates, groups.layout
        self.config = _config(layout, place.tensor, place.pipeline)
        self.named: dict[str, paddle.Tensor] = {}
        for index, (name, whole) in enumerate(wholes.items()):
            if layout.pipeline > 1 and _stage_of(name) != place.pipeline:
                continue
            split = find_split(FAMILY, name, self.config, degree=layout.tensor)
            part = split.part(whole, layout.tensor, place.tensor) if split else whole
            tensor = paddle.to_tensor(
                np.ascontiguousarray(part if fill else np.zeros_like(part)), stop_gradient=False
            )
            tensor.name = f"linear_{index}.w_{groups.rank}"
            self.named[name] = tensor

    def named_parameters(self):
        return list(self.named.items())

    def state_dict(self):
        return dict(self.named)


class Slices:
    """Flat slices of the sharding group's ranks."""

    def __init__(self, model: RankModel, groups: ProcessGroups):
        self.model, self.group = model, groups.sharding

    def tensor_names(self):
        return {f"{tensor.name}@slice": name for name, tensor in self.model.named.items()}

    def whole_shape(self, name):
        return tuple(self.model.named[name].shape)

    def slice_of(self, name, whole):
        flat = whole.numpy().ravel()
        padded = np.concatenate([flat, np.zeros(-len(flat) % self.group.size, flat.dtype)])
        return paddle.to_tensor(np.split(padded, self.group.size)[self.group.position])

    def whole_of(self, name, part):
        shape = self.whole_shape(name)
        parts = self.group.gather_objects(part.numpy())
        return paddle.to_tensor(np.concatenate(parts)[: int(np.prod(shape))].reshape(shape))


class Optimizer:
    """Keeps a state as Paddle's AdamW does."""

    def __init__(self, state=None):
        self.state = state or {}

    def state_dict(self):
        return dict(self.state)

    def set_state_dict(self, state):
        self.state = state


def _state(model: RankModel, slices: Slices, factor: float) -> dict[str, paddle.Tensor]:
    """Moments that follow from the weights, so that every rank can tell what it must find."""
    state, masters = {}, {}
    for generated, name in slices.tensor_names().items():
        for accumulator, power in (("moment1_0", 1), ("moment2_0", 2)):
            state[f"{generated}_{accumulator}"] = slices.slice_of(name, factor * model.named[name] ** power)
        state[f"{generated}_beta1_pow_acc_0"] = paddle.to_tensor([0.9 * factor])
        masters[generated] = slices.slice_of(name, model.named[name] + factor)
    return state | {"master_weights": masters, "LR_Scheduler": {"last_epoch": 3}}


def _save(folder: Path, layout: Layout, wholes, *, unified: bool) -> None:
    def work(groups):
        model = RankModel(groups, wholes)
        slices = Slices(model, groups)
        optimizer = Optimizer(_state(model, slices, 2.0))
        save_optimizer(folder, model, optimizer, groups, replicas=slices, unified=unified)

    assert run_ranks(layout, work) == [None] * layout.world


def _check(folder: Path, layout: Layout, wholes) -> None:
    def work(groups):
        model = RankModel(groups, wholes)
        slices = Slices(model, groups)
        optimizer, expected = Optimizer(), _state(model, slices, 2.0)
        load_optimizer(folder, model, optimizer, replicas=slices)
        expected.pop("LR_Scheduler")
        found, masters = dict(optimizer.state), expected.pop("master_weights")
        found_masters = found.pop("master_weights")
        assert found.keys() == expected.keys() and found_masters.keys() == masters.keys()
        for mine, theirs in ((found, expected), (found_masters, masters)):
            for key, tensor in mine.items():
                np.testing.assert_array_equal(tensor.numpy(), theirs[key].numpy(), err_msg=key)

    results = run_ranks(layout, work)
    assert results == [None] * layout.world


@pytest.mark.parametrize(
    ("source", "unified"),
    [*((layout, True) for layout in LAYOUTS), (LAYOUTS[4], False), (LAYOUTS[5], False)],
    ids=str,
)
def test_moments_go_from_any_layout_to_any(tmp_path, source, unified):
    wholes = _wholes(adapter=False)
    _save(tmp_path, source, wholes, unified=unified)
    kind = "optimizer*.safetensors" if unified else "optimizer*.pdopt"
    expected = source.pipeline * (1 if unified else source.tensor)
    assert len(list(tmp_path.glob(kind))) == expected
    for target in LAYOUTS:
        _check(tmp_path, target, wholes)


def test_state_of_another_model_is_refused(tmp_path):
    wholes = _wholes(adapter=False)
    _save(tmp_path, Layout(), wholes, unified=True)
    wholes.pop("chatglm_v2.output_layer.weight")
    model = RankModel(ProcessGroups(), wholes)
    with pytest.raises(RuntimeError, match=r"unknown parameters: \['chatglm_v2\.output_layer\.weight'\]"):
        load_optimizer(tmp_path, model, Optimizer())


def _adapter(groups: ProcessGroups, wholes, *, fill: bool = True):
    from paddlenlp.peft import LoRAConfig

    config = LoRAConfig(target_modules=[".*"], r=RANK, tensor_parallel_degree=groups.layout.tensor)
    return SimpleNamespace(model=RankModel(groups, wholes, fill=fill), lora_config=config)


@pytest.mark.parametrize("unified", [True, False], ids=["whole", "shards"])
@pytest.mark.parametrize("source", [Layout(), Layout(tensor=2), Layout(pipeline=2, tensor=2)], ids=str)
def test_adapters_go_from_any_layout_to_any(tmp_path, source, unified):
    wholes = _wholes(adapter=True)
    results = run_ranks(
        source, lambda groups: save_adapter(_adapter(groups, wholes), tmp_path, groups, unified=unified)
    )
    assert results == [None] * source.world

    def check(groups):
        expected, found = _adapter(groups, wholes), _adapter(groups, wholes, fill=False)
        load_adapter_weights(found, tmp_path)
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
