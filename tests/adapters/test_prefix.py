"""A prefix means the same on a whole model, on a tensor rank's heads and on a pipeline stage's layers."""

import numpy as np
import paddle
import pytest

from finetune.adapters.files import adapter_state, save_adapter
from finetune.adapters.prefix import add_prefix, load_prefix, partial_gradients
from finetune.models.layers import decoder_layers
from finetune.models.local_layers import replace_layers
from tests.adapters.conftest import make_stage

FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "chatglm2": {"num_key_value_heads": 2},
    "mistral": {},
    "bloom": {},
    "opt": {},
    "qwen": {},
}
HEADS_AXIS = {"opt": 1}
"""Axis of the heads among a layer's past keys, 2 elsewhere."""


def past(adapted) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values of every layer for a batch of two."""
    layers = adapted._get_past_key_values(2)
    return [tuple(part.numpy() for part in (layer[0], layer[1])) for layer in layers]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_tensor_ranks_share_out_the_heads(load, settings, name):
    model, family = load(name, **FAMILIES[name])
    adapted = add_prefix(model, settings, family=family, dtype="float32", seed=1)
    whole = past(adapted)
    model.config.tensor_parallel_degree = 2
    parts = []
    for rank in range(2):
        model.config.tensor_parallel_rank = rank
        parts.append(past(adapted))
    for layer, together in enumerate(whole):
        for which in (0, 1):
            cut = [part[layer][which] for part in parts]
            np.testing.assert_array_equal(np.concatenate(cut, axis=HEADS_AXIS.get(name, 2)), together[which])


def test_ranks_keep_all_heads_where_there_are_fewer_than_ranks(load, settings):
    model, family = load("llama", num_key_value_heads=2)
    adapted = add_prefix(model, settings, family=family, dtype="float32", seed=1)
    whole = past(adapted)
    model.config.tensor_parallel_degree, model.config.tensor_parallel_rank = 4, 3
    np.testing.assert_array_equal(past(adapted)[1][0], whole[1][0])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_stage_takes_its_layers(load, settings, name):
    model, family = load(name, **FAMILIES[name])
    adapted = add_prefix(model, settings, family=family, dtype="float32", seed=1)
    whole = past(adapted)
    layers = decoder_layers(model)
    for local in ([0, 1], [2, 3], [1, 3]):
        replace_layers(model, {number: layers[number] for number in local})
        adapted = add_prefix(model, settings, family=family, dtype="float32", seed=1)
        for number, mine in zip(local, past(adapted), strict=True):
            for which in (0, 1):
                np.testing.assert_array_equal(mine[which], whole[number][which])


def test_weights_do_not_depend_on_the_layout_and_keep_their_name(load, settings):
    model, family = load()
    whole = adapter_state(add_prefix(model, settings, family=family, dtype="float32", seed=1))
    assert {name: each.shape for name, each in whole.items()} == {"0.weight": [3, 4 * 2 * 32]}
    part, _ = load()
    part.config.tensor_parallel_degree, part.config.tensor_parallel_rank = 2, 1
    make_stage(part, 2, 4)
    paddle.rand([5])
    adapted = add_prefix(part, settings, family=family, dtype="float32", seed=1)
    np.testing.assert_array_equal(adapter_state(adapted)["0.weight"].numpy(), whole["0.weight"].numpy())
    assert adapted.prefix_config.tensor_parallel_degree == -1
    bound = np.sqrt(6 / (3 + 256))
    assert 0.95 * bound < np.abs(whole["0.weight"].numpy()).max() <= bound


def test_gradients_of_all_ranks_and_stages_add_up(load, settings):
    """Each part of the prefix is used by one rank of one stage, so the shares sum to the whole gradient."""
    model, family = load("llama")
    layers = replace_layers(model, dict(enumerate(decoder_layers(model))))
    adapted = add_prefix(model, settings, family=family, dtype="float32", seed=1)
    (name,) = partial_gradients(adapted)
    weight = dict(adapted.named_parameters())[name]

    def gradient() -> np.ndarray:
        adapted.clear_gradients()
        sum((key * key).sum() + (value**3).sum() for key, value in adapted._get_past_key_values(2)).backward()
        return weight.grad.numpy().copy()

    whole, shares = gradient(), []
    model.config.tensor_parallel_degree = 2
    for rank in range(2):
        for chunk in (range(0, 2), range(2, 4)):
            model.config.tensor_parallel_rank, layers.active = rank, chunk
            shares.append(gradient())
    np.testing.assert_allclose(np.sum(shares, axis=0), whole, rtol=1e-6)
    assert partial_gradients(model) == set()


def test_a_prefix_trained_in_half_precision_takes_the_type_of_the_model(load, settings, tmp_path):
    model, family = load()
    save_adapter(add_prefix(model, settings, family=family, dtype="bfloat16", seed=1), tmp_path)
    assert '"dtype": "bfloat16"' in (tmp_path / "prefix_config.json").read_text()
    loaded = load_prefix(load()[0], tmp_path, family=family)
    (weight,) = adapter_state(loaded).values()
    assert weight.dtype == paddle.float32
    assert {part.dtype for layer in loaded._get_past_key_values(2) for part in layer} == {paddle.float32}
