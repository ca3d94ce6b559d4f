"""Stages cut from every family's model: run one after another they are the whole model."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.families.family import families
from finetune.models.layers import named_weights
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.parallel.pipe.stage import build_stage
from finetune.parallel.pipe.stage_plan import StagePlan
from finetune.training.loss import LabelPositions, logits_of

LAYERS = 5


@pytest.fixture(scope="module", params=sorted(families()))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / request.param
    build_tiny(
        request.param, path, hidden_size=16, num_layers=LAYERS, num_heads=2, vocab_size=600, max_length=32
    )
    return path


def load(folder, plan=None, **overrides):
    resolved = resolve_model(folder)
    stages = []

    def build(model_class, config):
        stages.append(build_stage(model_class, config, family=resolved.family, plan=plan))
        return stages[0].model

    overrides = {"use_cache": False} | overrides
    model = load_model(resolved, dtype="float32", config_overrides=overrides, build=build if plan else None)
    model.train()
    return stages[0] if plan else model


def batch():
    ids = paddle.arange(5, 25).reshape([2, 10]) * 7 % 500
    return {"input_ids": ids, "attention_mask": paddle.ones_like(ids)}


@pytest.mark.parametrize(
    ("num_ranks", "num_chunks", "recompute"), [(2, 1, False), (2, 2, False), (3, 1, True)]
)
def test_stages_one_after_another_are_the_whole_model(folder, num_ranks, num_chunks, recompute):
    whole = load(folder, recompute=recompute)
    stages = [
        load(folder, StagePlan(rank, num_ranks, num_chunks), recompute=recompute) for rank in range(num_ranks)
    ]
    if recompute:
        for model in (whole, *(stage.model for stage in stages)):
            model.recompute_enable()
    expected = logits_of(whole(**batch()))
    expected.square().mean().backward()

    passes, received = [], None
    for part in range(num_ranks * num_chunks):
        stage = stages[part % num_ranks]
        with stage.computing(part, received):
            outputs = stage.model(**batch())
            is_last = part == num_ranks * num_chunks - 1
            output = logits_of(outputs).square().mean() if is_last else stage.take_output()
        passes.append((part, stage, received, output))
        if is_last:
            assert paddle.allclose(logits_of(outputs), expected, atol=1e-6)
        received = output.detach()
        received.stop_gradient = False
    gradient = None
    for part, stage, received, output in reversed(passes):
        with stage.computing(part, received):
            paddle.autograd.backward([output], [gradient])
        gradient = received.grad if received is not None else None

    wanted = {name: each.grad for name, each in named_weights(whole).items() if each.grad is not None}
    found: dict = {}
    for stage in stages:
        for name, parameter in named_weights(stage.model).items():
            if parameter.grad is not None:
                found[name] = found[name] + parameter.grad if name in found else parameter.grad
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert paddle.allclose(found[name], value, atol=1e-6, rtol=1e-4), name


def test_parameters_keep_their_names_and_each_is_somewhere(folder):
    stages = [load(folder, StagePlan(rank, 2)) for rank in range(2)]
    parts = [set(named_weights(stage.model)) for stage in stages]
    assert parts[0] | parts[1] == set(named_weights(load(folder)))
    family = resolve_model(folder).family
    assert getattr(stages[0].model.config, family.fields.num_layers) == LAYERS
    assert len(parts[0] & parts[1]) <= 1  # nothing but an embedding that the output layer is tied to


def test_layers_are_spread_evenly():
    plans = [StagePlan(rank, 3, 2) for rank in range(3)]
    assert [plan.layers(8) for plan in plans] == [
        [range(0, 2), range(5, 6)],
        [range(2, 4), range(6, 7)],
        [range(4, 5), range(7, 8)],
    ]


class Counted(paddle.nn.Layer):
    """A head in the place of another, as adapters put it there."""

    def __init__(self, head):
        super().__init__()
        self.inner, self.num_calls = head, 0

    def forward(self, *arguments, **more):
        self.num_calls += 1
        return self.inner(*arguments, **more)


def test_a_head_rests_with_its_hooks_while_an_earlier_chunk_is_computed(tmp_path):
    """In a model without a norm behind the last layer, where nothing else keeps what goes to the next part."""
    build_tiny("opt", tmp_path, hidden_size=16, num_layers=4, num_heads=2, vocab_size=600, max_length=32)
    config = json.loads((tmp_path / "config.json").read_text()) | {"normalize_before": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    kept = {
        name: each for name, each in weights.items() if ".layers." in name or "final_layer_norm" not in name
    }
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "np"})

    stage = load(tmp_path, StagePlan(1, 2, 2))
    head = stage.model.lm_head = Counted(stage.model.lm_head)
    positions = LabelPositions(head)
    labels = np.where(np.arange(20).reshape(2, 10) % 3, IGNORE_INDEX, 7)
    received = paddle.ones([2, 10, 16])
    with positions.only(labels), stage.computing(1, received):
        stage.model(**batch())
    assert stage.take_output().shape == [2, 10, 16]
    assert head.num_calls == 0
    with positions.only(labels), stage.computing(3, received):
        assert logits_of(stage.model(**batch())).shape[0] == (labels == 7).sum()
    assert head.num_calls == 1
