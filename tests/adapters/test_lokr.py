"""LoKr: sizes as peft and PaddleNLP divide them, the update of every shape, and what does not go together."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest

from finetune.adapters.adapter_folder import find_adapter_faults
from finetune.adapters.kronecker import factor_pair, kronecker_shapes
from finetune.adapters.lora import add_lora
from finetune.errors import UserError
from finetune.merge.kronecker_update import KroneckerUpdate
from finetune.merge.lora_adapters import check_adapter_folder


# As peft.tuners.lokr.layer.factorization has them; with 5 for 12 the root is the limit, with 6 for 12 the factor fits.
@pytest.mark.parametrize(
    ("size", "factor", "pair"),
    [
        (127, -1, (1, 127)), (128, -1, (8, 16)), (250, -1, (10, 25)), (360, -1, (18, 20)), (1024, -1, (32, 32)),
        (128, 2, (2, 64)), (127, 8, (1, 127)), (250, 8, (5, 50)), (360, 16, (15, 24)), (12, 5, (3, 4)),
        (12, 6, (6, 2)), (12, 12, (12, 1)), (1, -1, (1, 1)), (11008, 16, (16, 688)), (11008, -1, (86, 128)),
    ],
)  # fmt: skip
def test_sizes_are_divided_as_elsewhere(size, factor, pair):
    assert factor_pair(size, factor) == pair


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"rank": 2}, {"w1", "w2_a", "w2_b"}),
        ({"rank": 4}, {"w1", "w2"}),
        ({"rank": 1, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    ],
)
def test_matrices_are_products_where_that_is_less(options, ends):
    shapes = kronecker_shapes(24, 40, **options)  # 4 x 6 and 5 x 8
    assert set(shapes) == ends
    whole = {
        name: shapes.get(name) or (shapes[f"{name}_a"][0], shapes[f"{name}_b"][1]) for name in ("w1", "w2")
    }
    assert whole == {"w1": (5, 4), "w2": (8, 6)}


@pytest.fixture
def lokr(settings):
    """Settings of LoKr."""
    more = {"lokr": True, "lokr_dim": 2, "lokr_alpha": 6.0, "lokr_factor": -1, "decompose_both": False}
    vars(settings).update(more)
    return settings


@pytest.mark.parametrize("factor", [-1, 2, 3, 32])
@pytest.mark.parametrize("both", [False, True])
def test_the_update_is_that_of_the_formula(load, lokr, factor, both):
    lokr.lokr_factor, lokr.decompose_both = factor, both
    model, family = load()
    adapted = add_lora(model, lokr, family=family, dtype="float32", seed=1)
    name = "llama.layers.1.mlp.down_proj"
    layer, before = adapted.model.get_sublayer(name), model.state_dict()[f"{name}.weight"].numpy()
    x = paddle.rand([2, 3, before.shape[0]])
    np.testing.assert_array_equal(layer(x).numpy(), (x @ layer.weight).numpy())  # w1 is zero
    matrices = {}
    for each, tensor in layer.named_parameters():
        if each.startswith("lokr_"):
            tensor.set_value(paddle.rand(tensor.shape))
            matrices[each.removeprefix("lokr_")] = tensor.numpy()
    first, second = (
        matrices[each] if each in matrices else matrices[f"{each}_a"] @ matrices[f"{each}_b"]
        for each in ("w1", "w2")
    )
    expected = before + 3.0 * np.kron(first, second).T
    np.testing.assert_allclose(layer(x).numpy(), x.numpy() @ expected, rtol=2e-4, atol=1e-4)
    layer.merge()
    np.testing.assert_allclose(layer.weight.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("chosen", [None, [7, 0, 3, 11]])
def test_rows_of_an_update_are_those_of_the_whole(chosen, is_turned, tmp_path):
    random = np.random.default_rng(0)
    matrices = random.normal(size=(3, 2)).astype(np.float32), random.normal(size=(4, 5)).astype(np.float32)
    update = KroneckerUpdate((10, 12), lambda: matrices, tmp_path)
    expected = np.kron(*matrices).T
    if chosen is not None:
        update, expected = update.columns(np.array([1, *chosen])), expected[:, [1, *chosen]]
        update, expected = update.columns(np.arange(1, 5)), expected[:, 1:]
    if is_turned:
        update, expected = update.turned(), expected.T
    assert update.shape == expected.shape
    np.testing.assert_array_equal(update.whole(), expected)
    read = update.rows_reader()
    rows = [read(begin, min(3, len(expected) - begin)) for begin in range(0, len(expected), 3)]
    np.testing.assert_array_equal(np.concatenate(rows), expected)


@pytest.mark.parametrize(
    ("config", "fault"),
    [({"r": 4}, "alpha None"), ({"r": 4, "alpha": 2, "decompose_factor": "x"}, "decompose_factor 'x'")],
)
def test_unusable_configurations_of_peft(config, fault, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR"} | config))
    (found,) = find_adapter_faults("lora_path", tmp_path)
    assert f"has {fault}" in found


@pytest.mark.parametrize(
    ("name", "what"),
    [("vera_config.json", "VeRA"), ("lokr_config.json", "LoKr"), ("reft_config.json", "ReFT")],
)
def test_forms_of_paddlenlp_are_named(name, what, tmp_path):
    (tmp_path / name).write_text("{}")
    (fault,) = find_adapter_faults("lora_path", tmp_path)
    assert name in fault and what in fault
    with pytest.raises(UserError, match=rf"{name}, .*{what}.*, which is not read here"):
        check_adapter_folder(tmp_path)
