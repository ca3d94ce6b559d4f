"""What is float32 inside a half-precision run: positions, distances, scores, masks, norms, losses."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddlenlp.transformers.bloom.modeling import baddbmm, build_alibi_tensor
from paddlenlp.transformers.llama import modeling as llama_modeling
from paddlenlp.transformers.model_utils import dtype_guard

from finetune.families import attention
from finetune.families.family import get_family, import_object
from finetune.families.rotary import turn
from finetune.machine.half_precision import half_precision_on_cpu
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.parallel.sharding.start import start_replicas
from finetune.processes.groups import ProcessGroups
from finetune.training.loss import logits_of, token_loss_sum
from tests.families import decoding
from tests.families.cases import FACTS, small_options
from tests.families.family_facts import NUM_TINY_EXPERTS

FAMILIES = list(FACTS)
ROTARY = [name for name in FAMILIES if FACTS[name].rotary_tables]
LENGTH = 600
# Largest relative error of one rounding to bfloat16, which has 8 bits.
ROUNDING = 2.0**-8


@pytest.fixture
def half():
    with half_precision_on_cpu():
        yield


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    root, made = tmp_path_factory.mktemp("float32"), {}

    def folder(name: str):
        if name not in made:
            options = {"vocab_size": 330, "num_layers": 2, "hidden_size": 64, "max_length": 1024}
            options |= small_options(name)
            made[name] = build_tiny(name, root / name, corpus=corpus, **options)
        return made[name]

    return folder


def load(folder, dtype: str, **overrides):
    """A model whose attention matters, its weights those of bfloat16 in any type."""
    overrides = {"use_cache": False, **overrides}
    model = load_model(resolve_model(folder), dtype=dtype, config_overrides=overrides)
    for name, parameter in model.named_parameters():
        scale = 1.0 if "norm" in name or "ln_" in name else 4.0
        values = (parameter.astype("float32") * scale).astype("bfloat16").astype("float32")
        parameter.set_value(values.astype(parameter.dtype))
    model.eval()
    return model


def bfloat16(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(array, np.float32)).astype("bfloat16")


def wide(tensor) -> np.ndarray:
    return tensor.astype("float32").numpy()


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# Rotary positions


def angles(positions, dim: int, *, halves: bool) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Cos and sin, float32 [1, positions, 1, dim]."""
    frequencies = 10000.0 ** (-np.arange(0, dim, 2) / dim)
    turned = np.asarray(positions, np.float64)[:, None] * frequencies
    both = np.concatenate([turned, turned], axis=-1) if halves else np.repeat(turned, 2, axis=-1)
    return tuple(
        paddle.to_tensor(function(both).astype(np.float32)[None, :, None]) for function in (np.cos, np.sin)
    )


def turned_by_autograd(x, cos, sin, *, halves: bool):
    if halves:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + paddle.concat([-second, first], axis=-1) * sin
    pairs = paddle.stack([-x[..., 1::2], x[..., 0::2]], axis=-1).flatten(-2)
    return x * cos + pairs * sin


@pytest.mark.parametrize("halves", [True, False], ids=["halves", "neighbours"])
def test_turning_has_the_values_and_gradients_of_its_formula(halves):
    cos, sin = angles([0, 3, 5000, 31999], 8, halves=halves)
    results = []
    for function in (turn, turned_by_autograd):
        x = paddle.to_tensor(_numbers((2, 4, 3, 8)))
        x.stop_gradient = False
        out = function(x, cos, sin, halves=halves)
        (out * paddle.to_tensor(_numbers(out.shape, seed=1))).sum().backward()
        results.append((out.numpy(), x.grad.numpy()))
    (ours, our_gradient), (theirs, their_gradient) = results
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(our_gradient, their_gradient, atol=1e-6)


def _numbers(shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_turned_heads_are_rounded_once(half):
    x = bfloat16(_numbers((1, 4, 2, 64)))
    cos, sin = angles([1, 257, 258, 30000], 64, halves=True)
    exact = turned_by_autograd(x.astype("float32"), cos, sin, halves=True)
    assert turn(x, cos, sin).dtype == paddle.bfloat16
    assert np.array_equal(wide(turn(x, cos, sin)), wide(exact.astype("bfloat16")))
    for level in ("O1", "O2"):
        with paddle.amp.auto_cast(level=level, dtype="bfloat16"):
            assert np.array_equal(wide(turn(x, cos, sin)), wide(exact.astype("bfloat16")))
    stepwise = turned_by_autograd(x, cos.astype("bfloat16"), sin.astype("bfloat16"), halves=True)
    assert (
        np.abs(wide(stepwise) - wide(exact)).max() > 1.5 * np.abs(wide(turn(x, cos, sin)) - wide(exact)).max()
    )


@pytest.mark.parametrize("name", ROTARY)
def test_tables_of_positions_are_float32_in_a_model_of_half_precision(folders, half, name, monkeypatch):
    """What turns heads gets and gives, in the layers of a bfloat16 model."""
    family = get_family(name)
    model = load(folders(name), "bfloat16")
    function = FACTS[name].rotary_function
    if "." not in function:  # of PaddleNLP's module
        function = f"{import_object(family.model_class).__mro__[1].__module__}.{function}"
    stock, seen = import_object(function), []

    def spy(*inputs, **named):
        results = stock(*inputs, **named)
        inputs = (*inputs, *(each for each in named.values() if not isinstance(each, bool)))
        seen.append((inputs, results if isinstance(results, tuple) else (results,)))
        return results

    monkeypatch.setattr(function, spy)
    ids = np.stack(decoding.random_rows([300]))
    decoding.logits(model, ids)
    assert seen
    for inputs, results in seen:
        tables = [each for each in inputs if each is not None and each.dtype == paddle.float32]
        assert len(tables) == FACTS[name].rotary_tables, [each.dtype for each in inputs]
        assert all(each.dtype == paddle.bfloat16 for each in results)
    tables = [each.numpy() for each in seen[0][0] if each is not None and each.dtype == paddle.float32]
    seen.clear()
    decoding.logits(load(folders(name), "float32"), ids)
    heads = len(seen[0][1])  # what is turned is float32, too
    expected = [each.numpy() for each in seen[0][0][heads:] if each is not None and each.is_floating_point()]
    assert len(tables) == len(expected)
    for found, exact in zip(tables, expected, strict=True):
        np.testing.assert_array_equal(found, exact)


# Distances


def probabilities(query, key, visible) -> np.ndarray:
    """Attention over values that are the unit vectors: the probabilities, [heads, queries, keys]."""
    num_heads, num_keys = query.shape[2], key.shape[1]
    value = paddle.eye(num_keys).astype(query.dtype).reshape([1, num_keys, 1, num_keys])
    value = value.expand([1, num_keys, num_heads, num_keys])
    return wide(attention.plain_attention(query, key, value, visible))[0].transpose(1, 0, 2)


@pytest.fixture(scope="module")
def distances():
    """Queries and keys of 4 heads (rounded to bfloat16), slopes, and exact scores with distances, causal."""
    query, key = (
        wide(bfloat16(_numbers((1, LENGTH, 4, 64), seed) * 1.5)).astype(np.float64) for seed in (0, 1)
    )
    slopes = 2.0 ** -np.arange(2, 9, 2)
    products = np.einsum("bqhd,bkhd->hqk", query, key) / 8
    positions = np.arange(LENGTH)
    scores = products + slopes[:, None, None] * (positions[None, None] - positions[None, :, None])
    scores = np.where(np.tri(LENGTH, dtype=bool), scores, -np.inf)
    return SimpleNamespace(query=query, key=key, slopes=slopes, scores=scores, products=products)


def bias_of(distances):
    visible = attention.dense_mask(None, (1, LENGTH))
    slopes = paddle.to_tensor(distances.slopes.astype(np.float32))
    return attention.distance_bias(slopes, paddle.arange(LENGTH).unsqueeze(0), visible)


def test_bfloat16_probabilities_with_distances_are_those_of_float32(half, distances):
    exact = softmax(distances.scores)
    query, key = bfloat16(distances.query), bfloat16(distances.key)
    found = probabilities(query, key, bias_of(distances))
    # The scaled query and the product are rounded, and the probability at the end; nothing of the distance is.
    size = np.abs(distances.products).max()
    assert np.abs(found - exact).max() <= exact.max() * (2.5 * ROUNDING * size + ROUNDING)
    assert (np.abs(found - exact) <= exact * 4 * ROUNDING * size + 1e-6).all()
    # PaddleNLP's form: positions and scores in the type of the run.
    slopes = paddle.to_tensor(distances.slopes.astype(np.float32)).reshape([-1, 1, 1])
    alibi = (slopes * paddle.arange(LENGTH).astype("float32")).astype("bfloat16")
    heads = [wide(each)[0].transpose(1, 0, 2) for each in (query, key)]
    scores = baddbmm(alibi, bfloat16(heads[0]), bfloat16(heads[1].transpose(0, 2, 1)), alpha=1 / 8)
    rounded_away = softmax(np.where(np.tri(LENGTH, dtype=bool), wide(scores), -np.inf))
    assert np.abs(rounded_away - exact).max() > 10 * np.abs(found - exact).max()


def test_distances_in_the_type_of_a_fused_kernel_lose_nothing_that_counts(distances):
    """A kernel takes its bias in bfloat16 and adds it in float32; a difference of positions survives that."""
    exact = softmax(distances.scores)
    rounded = attention.additive(bias_of(distances), paddle.bfloat16)
    assert rounded.dtype == paddle.bfloat16
    found = softmax(distances.products + wide(rounded)[0])
    np.testing.assert_allclose(found, exact, atol=ROUNDING)
    columns = bfloat16(distances.slopes[:, None, None] * np.arange(LENGTH))
    by_column = np.where(np.tri(LENGTH, dtype=bool), distances.products + wide(columns), -np.inf)
    assert np.abs(softmax(by_column) - exact).max() > 20 * ROUNDING


def test_distances_are_those_of_press_et_al():
    slopes = build_alibi_tensor(paddle.ones([1, 2], dtype="bool"), 8, paddle.float32)[0, :, 1]
    np.testing.assert_allclose(slopes.numpy(), 2.0 ** -np.arange(1, 9), rtol=1e-6)
    visible = attention.dense_mask(None, (1, 2), 1)
    bias = attention.distance_bias(slopes, paddle.to_tensor([[0, 1, 2]]), visible)
    lowest = paddle.finfo(paddle.float32).min
    assert bias[0, 0].tolist() == [[-0.5, 0.0, lowest], [-1.0, -0.5, 0.0]]


def test_a_llama_with_distances_sees_packed_samples_and_half_precision(folders, half):
    """Baichuan-13B comes as such a folder."""
    settings = {"alibi": True}
    model = load(folders("llama"), "float32", **settings)
    rows = decoding.random_rows([280, 290])
    separate = np.concatenate([decoding.logits(model, row[None])[0] for row in rows])
    batch = decoding.packed(rows)
    del batch["position_ids"]
    ids = batch.pop("ids")
    np.testing.assert_allclose(decoding.logits(model, ids, **batch)[0], separate, atol=1e-4)
    fused = load(folders("llama"), "float32", use_flash_attention=True, **settings)
    np.testing.assert_allclose(decoding.logits(fused, ids, **batch)[0], separate, atol=1e-4)
    in_half = load(folders("llama"), "bfloat16", **settings)
    error = np.abs(wide(_logits(in_half, ids, **batch))[0] - separate).mean(axis=-1)
    assert error[-100:].mean() < 1.5 * error[:100].mean()


# Norms


@pytest.mark.parametrize("level", [None, "O1", "O2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_norms_are_rounded_no_more_than_twice(folders, half, name, level):
    model = load(folders(name), "float32" if level == "O1" else "bfloat16")
    norms = {
        type(layer): layer
        for layer in model.sublayers()
        if "norm" in type(layer).__name__.casefold() and layer.weight.ndim == 1
    }
    assert norms
    for norm in norms.values():
        _check_rounding(norm, level, offset=FACTS[name].norm_offset, centres=FACTS[name].norm_centres)


def _check_rounding(norm, level, *, offset: float, centres: bool) -> None:
    size = norm.weight.shape[0]
    norm.weight.set_value(bfloat16(1.0 - offset + 0.3 * _numbers([size], 5)).astype(norm.weight.dtype))
    x = bfloat16(_numbers((8, 16, size), 6) * 3)
    context = paddle.amp.auto_cast(level=level, dtype="bfloat16") if level else contextlib.nullcontext()
    with context, paddle.no_grad():
        found = norm(x)
    assert found.dtype == paddle.bfloat16 or level == "O1"
    values = wide(x).astype(np.float64)
    if centres:
        values = values - values.mean(-1, keepdims=True)
    scale = np.sqrt((values**2).mean(-1, keepdims=True) + 1e-5)
    exact = values / scale * (wide(norm.weight) + offset)
    # Rounded behind the norm and behind the weight.
    assert (np.abs(wide(found) - exact) <= np.abs(exact) * 2.1 * ROUNDING + 1e-4).all()


def test_norm_weights_of_gemma_keep_what_they_learned(folders, half):
    """1 + 0.003 is 1 in bfloat16, while 0.003 is not 0."""
    norm = load(folders("gemma"), "bfloat16").gemma.layers[0].input_layernorm
    norm.weight.set_value(bfloat16(np.full([64], 0.003)))
    x = bfloat16(np.random.default_rng(0).choice([-1.0, 1.0], size=(4, 64)))
    gain = np.abs(wide(norm(x.astype("float32")))).mean()
    assert gain == pytest.approx(1.003, abs=1e-4)
    many = wide(norm(bfloat16(_numbers((64, 64))))).astype(np.float64)
    norm.weight.set_value(bfloat16(np.zeros([64])))
    assert np.abs(many).sum() / np.abs(wide(norm(bfloat16(_numbers((64, 64)))))).sum() > 1.001


# Whole models


def _logits(model, ids, *, level=None, dtype="bfloat16", **inputs):
    context = (
        paddle.amp.auto_cast(
            level=level,
            dtype=dtype,
            custom_black_list={"reduce_sum", "c_softmax_with_cross_entropy"},
            custom_white_list={"lookup_table", "lookup_table_v2"} if level == "O2" else set(),
        )
        if level
        else contextlib.nullcontext()
    )
    tensors = {name: paddle.to_tensor(array) for name, array in inputs.items()}
    with paddle.no_grad(), context:
        return logits_of(model(input_ids=paddle.to_tensor(ids), **tensors)).astype("float32")


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_late_tokens_are_as_exact_as_early_ones(folders, half, name, level):
    """Rounded positions or distances show from position 256 on.

    PaddleNLP's own layers are off by seven times as much there for BLOOM, and by twice as much for Gemma.
    """
    ids = np.stack(decoding.random_rows([LENGTH]))
    # Every expert for every token: rounding gives some tokens another one, which says nothing of their positions.
    facts = FACTS[name]
    overrides = {"num_experts_per_tok": NUM_TINY_EXPERTS} if facts.chooses_experts else {}
    expected = wide(_logits(load(folders(name), "float32", **overrides), ids))
    model = load(folders(name), "float32" if level == "O1" else "bfloat16", **overrides)
    error = np.abs(wide(_logits(model, ids, level=level)) - expected)[0].mean(axis=-1) / expected.std()
    assert error[:100].mean() < 0.01
    assert error[-100:].mean() < 1.3 * error[:100].mean()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_on_the_left_is_finite_in_half_precision(folders, half, name, dtype):
    """A row of the mask with nothing to see must not become NaN: the next layer would spread it."""
    rows = decoding.random_rows([40, 9])
    length = 40
    ids = np.stack([np.pad(row, (length - len(row), 0)) for row in rows])
    mask = np.stack([np.arange(length) >= length - len(row) for row in rows]).astype(np.int64)
    inputs = {"attention_mask": mask, "position_ids": ((mask.cumsum(1) - 1) * mask).clip(0)}
    for fused in (False, True):
        model = load(folders(name), dtype, use_flash_attention=fused)
        for level in (None, "O2"):
            found = wide(_logits(model, ids, level=level, dtype=dtype, **inputs))
            alone = wide(_logits(model, rows[1][None], level=level, dtype=dtype))[0]
            assert np.isfinite(found).all()
            assert np.abs(found[1, length - 9 :] - alone).mean() < 0.02 * alone.std()


def test_losses_are_summed_in_float32(half):
    random = np.random.default_rng(0)
    logits = bfloat16(random.normal(size=(512, 40)) * 3)
    labels = paddle.to_tensor(random.integers(0, 40, 512))
    expected = F.cross_entropy(logits.astype("float32"), labels, reduction="sum")
    for level in (None, "O1", "O2"):
        with paddle.amp.auto_cast(level=level, dtype="bfloat16") if level else contextlib.nullcontext():
            loss = token_loss_sum(logits, labels)
        assert loss.dtype == paddle.float32
        assert float(loss) == float(expected)


def test_paddlenlp_rounds_tables_and_every_step():
    """What stands behind the stand-in for Llama's rotary embedding."""
    layer = llama_modeling.LlamaRotaryEmbedding(8, 16)
    cos, _ = layer(SimpleNamespace(dtype=paddle.bfloat16), seq_len=16)
    assert cos.dtype == paddle.bfloat16


def test_squares_of_small_gradients_do_not_vanish(half):
    """1e-4 squared is nothing in float16."""
    with dtype_guard("float16"):
        layer = paddle.nn.Linear(30, 40, bias_attr=False)
    replicas = start_replicas(layer, ProcessGroups(), 0)
    (layer(paddle.ones([1, 30], dtype="float16")) * 1e-4).sum().backward()
    replicas.after_micro_batch()
    replicas.sum_gradients()
    gradient = float(layer.weight.grad.astype("float32").max())
    assert layer.weight.grad.dtype == paddle.float16 and gradient == pytest.approx(1e-4, rel=1e-3)
    assert float(replicas.squared_norm(lambda _: True)) == pytest.approx(1200 * gradient**2, rel=1e-5)
