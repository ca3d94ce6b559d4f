"""More embeddings than the files hold, for every family; and the arithmetic of slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.models import parameters
from finetune.models.loading import load_model, load_weights
from finetune.models.resolve import resolve_model
from finetune.models.vocabulary import VocabularyGrowth, find_growth, grown_part_reader, is_other_tokenizer
from finetune.storage.splits import Split


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of 1 KiB, so that tiny tensors are cut too."""
    monkeypatch.setattr(parameters, "SLICE_BYTES", 1024)


def _growth(model, family) -> VocabularyGrowth:
    size = model.config.vocab_size
    return VocabularyGrowth(size, size + 10, (family.embedding_module, family.head_module))


@pytest.mark.usefixtures("small_slices")
def test_every_family_grows(case, tiny_folder, tmp_path):
    resolved = resolve_model(tiny_folder)
    plain = load_model(resolved, dtype="float32")
    growth = _growth(plain, resolved.family)
    grown = load_model(resolved, dtype="float32", growth=growth)
    assert grown.config.vocab_size == growth.new
    num_grown = 0
    for name, parameter in plain.state_dict().items():
        old, new = parameter.numpy(), grown.state_dict()[name].numpy()
        if old.shape == new.shape:
            np.testing.assert_array_equal(new, old)
            continue
        num_grown += 1
        axis = old.shape.index(growth.old)
        rows = np.moveaxis(new, axis, 0)
        np.testing.assert_array_equal(rows[: growth.old], np.moveaxis(old, axis, 0))
        np.testing.assert_allclose(
            rows[growth.old :], np.broadcast_to(old.mean(axis, dtype=np.float64), rows[growth.old :].shape),
            atol=1e-7,
        )  # fmt: skip
    assert num_grown == 2  # input and output, one tensor or two
    grown.save_pretrained(str(tmp_path / "saved"))
    again = load_model(resolve_model(tmp_path / "saved"), dtype="float32")
    assert again.config.vocab_size == growth.new
    for name, parameter in grown.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), parameter.numpy())


def test_a_checkpoint_of_a_grown_model_fits_it(llama_folder, tmp_path):
    resolved = resolve_model(llama_folder)
    growth = VocabularyGrowth(330, 350, ("embed_tokens", "lm_head"))
    first = load_model(resolved, dtype="float32", growth=growth)
    first.lm_head.weight.set_value(first.lm_head.weight * 2)
    first.save_pretrained(str(tmp_path / "saved"))
    second = load_model(resolved, dtype="float32", growth=growth)
    load_weights(second, tmp_path / "saved")
    np.testing.assert_array_equal(second.lm_head.weight.numpy(), first.lm_head.weight.numpy())


def test_other_tensors_of_another_shape_are_still_faults(llama_folder):
    resolved = resolve_model(llama_folder)
    with pytest.raises(
        UserError, match=r"lm_head.weight is \[64, 330\] in the files, \[64, 350\] in the model"
    ):
        load_model(resolved, dtype="float32", growth=VocabularyGrowth(330, 350, ("embed_tokens",)))


def test_when_a_model_grows():
    family = get_family("llama")
    assert find_growth(100, 100, family=family, other_tokenizer=True) is None
    assert find_growth(100, 90, family=family, other_tokenizer=False) is None
    assert find_growth(None, 90, family=family, other_tokenizer=False) is None
    growth = find_growth(100, 110, family=family, other_tokenizer=True)
    assert growth == VocabularyGrowth(100, 110, ("embed_tokens", "lm_head"))
    with pytest.raises(UserError, match="110 tokens but the model only 100 embeddings"):
        find_growth(100, 110, family=family, other_tokenizer=False)


def test_the_models_own_folder_is_no_other_tokenizer(tmp_path):
    assert not is_other_tokenizer(None, tmp_path)
    assert not is_other_tokenizer(f"{tmp_path}/sub/..", tmp_path)
    assert is_other_tokenizer(tmp_path / "other", tmp_path)
    assert is_other_tokenizer("org/tokenizer", Path("org/model"))


@pytest.mark.parametrize(
    ("old", "degree", "expected"),
    [
        (4, 2, [[[0, 1, 2], [4, 5, 6], [8, 9, 10]], [[3, 1.5, 1.5], [7, 5.5, 5.5], [11, 9.5, 9.5]]]),
        (4, 3, [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]], [[1.5] * 2, [5.5] * 2, [9.5] * 2]]),
    ],
)
def test_parts_of_a_tensor_that_grows(small_slices, old, degree, expected):
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    growth = VocabularyGrowth(old, 6, ("lm_head",))
    for rank in range(degree):
        read = grown_part_reader(lambda: array, growth, Split(-1, unit=6), degree=degree, rank=rank)
        np.testing.assert_array_equal(read(), expected[rank])
        rows = grown_part_reader(lambda: array.T, growth, Split(0, unit=6), degree=degree, rank=rank)
        np.testing.assert_array_equal(rows().T, expected[rank])


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axis", [0, 1])
def test_means_over_slices(order, axis):
    array = np.asarray(np.random.default_rng(0).normal(size=(70, 40)), dtype=np.float16, order=order)
    expected = array.astype(np.float64).mean(axis, keepdims=True)
    np.testing.assert_allclose(parameters.mean_along(array, axis), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_slices_reach_their_place(order, dtype):
    import paddle

    array = np.asarray(np.random.default_rng(0).normal(size=(70, 40)), dtype=np.float32, order=order)
    zeros = paddle.nn.initializer.Constant(0.0)
    target = paddle.nn.Layer().create_parameter([70, 40], dtype=dtype, default_initializer=zeros)
    address = target.data_ptr()
    parameters.assign(target, array)
    expected = paddle.to_tensor(np.ascontiguousarray(array)).cast(dtype).astype("float32")
    np.testing.assert_array_equal(target.astype("float32").numpy(), expected.numpy())
    assert target.data_ptr() == address
    assert not target.stop_gradient
