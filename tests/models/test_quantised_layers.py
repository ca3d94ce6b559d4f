"""LoRA over packed weights trains as LoRA over what they stand for, and keeps no copy of it."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from finetune.adapters.files import save_adapter
from finetune.adapters.lora import add_lora, load_lora
from finetune.errors import UserError
from finetune.machine.half_precision import half_precision_on_cpu
from finetune.models.loading import load_model
from finetune.models.quantised.layers import packed_layers
from finetune.models.quantised.packed_weights import PackedFourBit, packed_linear, to_device
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.storage.quantisation.packed_weights import pack_matrix
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.training.loss import logits_of
from tests.families.cases import FACTS

SCHEMES = {
    "nf4": QuantisationScheme(algorithm="nf4"),
    "fp4 double": QuantisationScheme(algorithm="fp4", double_quant=True),
    "int8": QuantisationScheme(algorithm="llm.int8"),
}
FAMILIES = tuple(FACTS)
LORA = {"lora_target_modules": None, "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0, "rslora": False,
        "lora_plus_scale": 1.0, "pissa": False, "model_name_or_path": "tiny", "modules_to_save": None,
        "use_dora": False, "lora_use_mixer": False, "rank_pattern": None, "alpha_pattern": None, "lora_bias": "none", "lora_dtype": None,
        "init_lora_weights": "default", "vera": False, "lokr": False}  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Family -> folder of a tiny checkpoint, made when first asked for."""
    made = {}

    def folder(family: str):
        if family not in made:
            made[family] = build_tiny(family, tmp_path_factory.mktemp("packed") / family,
                                      vocab_size=500, num_layers=2, num_heads=4, hidden_size=32)  # fmt: skip
        return made[family]

    return folder


def adapted(folder, scheme, *, keep_packed: bool, dtype: str = "float32", **settings):
    resolved = resolve_model(folder)
    model = load_model(
        resolved,
        dtype=dtype,
        config_overrides={"use_cache": False},
        quantisation=scheme,
        keep_packed=keep_packed,
    )
    chosen = SimpleNamespace(**LORA | settings)
    model = add_lora(model, chosen, family=resolved.family, dtype=dtype, seed=1)
    model.mark_only_lora_as_trainable()
    model.train()
    return model


def test_an_adapter_whose_start_leaves_the_weights_is_refused(folder_of, tmp_path):
    """One that was trained over ordinary weights, put over packed ones later."""
    folder = folder_of("llama")
    save_adapter(adapted(folder, None, keep_packed=False, pissa=True), tmp_path)
    model = load_model(resolve_model(folder), dtype="float32", quantisation=SCHEMES["nf4"], keep_packed=True)
    with pytest.raises(UserError, match="holds it in packed form"):
        load_lora(model, tmp_path)


def train(model, num_steps: int = 4) -> list[float]:
    ids = paddle.to_tensor(np.random.default_rng(0).integers(5, 400, (2, 12)))
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.SGD(0.5, parameters=trained)
    found = []
    for _ in range(num_steps):
        logits = logits_of(model(input_ids=ids)).astype("float32")
        loss = paddle.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        found.append(float(loss))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_curve_is_that_over_the_dequantised_base(folder_of, family, dtype):
    scheme = list(SCHEMES.values())[FAMILIES.index(family) % 3]
    context = half_precision_on_cpu() if dtype == "bfloat16" else contextlib.nullcontext()
    with context:
        packed, plain = (
            train(adapted(folder_of(family), scheme, keep_packed=keep, dtype=dtype)) for keep in (True, False)
        )
    # A bias is added in a rounding of its own.
    assert packed == (plain if dtype == "float32" else pytest.approx(plain, abs=2e-3))
    assert min(packed[1:]) < packed[0], packed


@pytest.mark.parametrize("kind", SCHEMES)
def test_kinds_settings_and_recompute(folder_of, kind):
    settings = {
        "rslora": True,
        "lora_target_modules": [".*q_proj", ".*down_proj"],
        "modules_to_save": ["lm_head"],
    }
    packed, plain = (
        adapted(folder_of("llama"), SCHEMES[kind], keep_packed=keep, **settings) for keep in (True, False)
    )
    assert len(packed_layers(packed)) == 14  # layers without an update are packed as well
    curve = train(packed)
    assert curve == train(plain)
    again = adapted(folder_of("llama"), SCHEMES[kind], keep_packed=True, **settings)
    again.recompute_enable()
    assert train(again) == curve
    assert len({name for name in packed.state_dict() if name.endswith("proj.weight")}) == 0


def test_layers_that_stay_as_they_are(folder_of):
    model = load_model(
        resolve_model(folder_of("llama")), dtype="float32", quantisation=SCHEMES["nf4"], keep_packed=True
    )
    plain = load_model(resolve_model(folder_of("llama")), dtype="float32")
    kept = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    expected = dict(plain.named_parameters())
    assert {name.split(".")[-2] for name in kept} == {
        "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "lm_head",
    } - ({"lm_head"} - {name.split(".")[-2] for name in kept})  # fmt: skip
    for name, array in kept.items():
        np.testing.assert_array_equal(array, expected[name].numpy())


def test_modules_that_are_packed_cannot_be_trained_whole(folder_of):
    with pytest.raises(UserError, match="modules_to_save: o_proj is held in packed weights"):
        adapted(folder_of("llama"), SCHEMES["nf4"], keep_packed=True,
                lora_target_modules=[".*q_proj"], modules_to_save=["o_proj"])  # fmt: skip


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("shape", [(48, 64), (7, 33)])
def test_values_on_the_device_are_those_of_the_codec(kind, shape):
    matrix = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    packed = pack_matrix(matrix, SCHEMES[kind], name="w")
    weight = to_device(packed, paddle.float32)
    np.testing.assert_array_equal(weight.values().numpy(), packed.values())
    assert weight.shape == [shape[1], shape[0]]


def test_gradients_are_those_of_a_linear_layer():
    matrix = np.random.default_rng(3).standard_normal((24, 64)).astype(np.float32)
    weight = to_device(pack_matrix(matrix, SCHEMES["nf4"], name="w"), paddle.float32)
    inputs = [paddle.rand([3, 5, 64]) for _ in range(1)]
    x, y = inputs[0].clone(), inputs[0].clone()
    x.stop_gradient = y.stop_gradient = False
    bias = paddle.rand([24])
    ours = packed_linear(x, weight, bias)
    theirs = paddle.nn.functional.linear(y, weight.values().t(), bias)
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-6)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), y.grad.numpy(), rtol=1e-5, atol=1e-5)


def test_no_values_are_kept_between_forward_and_backward(monkeypatch):
    """Every call computes them anew, and nothing holds what a call returned."""
    import weakref

    matrix = np.random.default_rng(4).standard_normal((64, 64)).astype(np.float32)
    weight = to_device(pack_matrix(matrix, SCHEMES["nf4"], name="w"), paddle.float32)
    made = []
    compute = PackedFourBit.borrowed_values

    def values(self):
        found = compute(self)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(PackedFourBit, "borrowed_values", values)
    x = paddle.rand([2, 64])
    x.stop_gradient = False
    result = packed_linear(x, weight)
    gc.collect()
    assert [reference() for reference in made] == [None]
    result.sum().backward()
    gc.collect()
    assert [reference() for reference in made] == [None, None]


@pytest.mark.parametrize("kind", SCHEMES)
def test_weights_that_are_in_use_one_after_the_other_share_memory(kind):
    random = np.random.default_rng(5)
    matrices = [random.standard_normal(shape).astype(np.float32) for shape in ((64, 64), (32, 64))]
    large, small = (
        to_device(pack_matrix(each, SCHEMES[kind], name="w"), paddle.float32) for each in matrices
    )
    first = large.borrowed_values()
    expected = large.values().numpy()
    np.testing.assert_array_equal(first.numpy(), expected)
    second = small.borrowed_values()
    assert second.data_ptr() == first.data_ptr()
    np.testing.assert_array_equal(second.numpy(), small.values().numpy())
    assert (large.values().numpy() == expected).all()
