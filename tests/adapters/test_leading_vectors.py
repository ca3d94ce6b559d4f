"""Leading singular vectors: the searched ones are those of the exact decomposition, the plain ones as good as Halko's."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from finetune.adapters import leading_vectors as module
from finetune.adapters.initial_weights import find_starts
from finetune.adapters.leading_vectors import TOLERANCE, leading_vectors, num_rounds_of


def make_weight(rows: int, columns: int, decay: float) -> np.ndarray:
    """Random vectors with singular values that fall as (n + 1)^-decay."""
    random = np.random.default_rng(0)
    size = min(rows, columns)
    left, right = (np.linalg.qr(random.standard_normal((side, size)))[0] for side in (rows, columns))
    return ((left * (np.arange(1, size + 1) ** -decay)) @ right.T).astype(np.float32)


def exact_part(weight: np.ndarray, rank: int) -> np.ndarray:
    left, sizes, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank]


@pytest.mark.parametrize("shape", [(700, 600), (600, 700), (600, 600)])
@pytest.mark.parametrize("decay", [0.5, 1.5])
def test_the_error_is_below_what_is_stated(shape, decay, monkeypatch):
    monkeypatch.setattr(module, "_decomposed", None)  # searched, not decomposed
    weight, rank = make_weight(*shape, decay), 6
    left, sizes, right = leading_vectors(weight, rank)
    expected = exact_part(weight, rank)
    error = np.linalg.norm((left * sizes) @ right - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE
    np.testing.assert_allclose(sizes, np.arange(1, rank + 1) ** -decay, rtol=1e-5)
    np.testing.assert_allclose(left.T @ left, np.eye(rank), atol=1e-4)
    np.testing.assert_allclose(right @ right.T, np.eye(rank), atol=1e-5)


def test_what_cannot_be_told_apart_is_decomposed():
    """The sixth and the seventh singular value are one: no search settles, and either vector is right."""
    random, size = np.random.default_rng(1), 600
    turn = np.linalg.qr(random.standard_normal((size, size)))[0]
    sizes = np.r_[np.arange(8, 3, -1), 3.0, 3.0, np.full(size - 7, 0.5)]
    weight = ((turn * sizes) @ turn.T).astype(np.float32)
    assert module._krylov(weight, 6, 20, 0) is None
    found = leading_vectors(weight, 6)
    np.testing.assert_allclose(found[1], sizes[:6], rtol=1e-5)


def test_a_number_of_rounds_is_the_plain_method():
    weight, rank = make_weight(600, 540, 0.7), 8
    best = np.linalg.norm(weight - exact_part(weight, rank))
    errors = []
    for rounds in (1, 4, 16):
        left, sizes, right = leading_vectors(weight, rank, num_rounds=rounds, seed=3)
        errors.append(np.linalg.norm(weight - (left * sizes) @ right) / best - 1)
    assert errors[0] > errors[1] > errors[2] >= -1e-6 and errors[0] < 0.1 and errors[2] < 1e-3


@pytest.mark.parametrize(("word", "rounds"), [("pissa_niter_4", 4), ("pissa", None), ("pissa_niter_0", None)])
def test_words(word, rounds):
    assert num_rounds_of(word) == rounds


def test_every_layer_has_its_own_factors_in_order():
    import paddle

    layers = {f"layer.{number}": SimpleNamespace(weight=paddle.rand([9, 7]), r=2) for number in range(3)}
    config = SimpleNamespace(tensor_parallel_degree=-1, tensor_parallel_rank=-1)
    found = dict(find_starts(layers, config, kind="pissa", seeds=dict.fromkeys(layers, 0)))
    assert list(found) == list(layers)
    for name, (left, right) in found.items():
        np.testing.assert_allclose(left @ right, exact_part(layers[name].weight.numpy(), 2), atol=1e-5)
