"""Every preference loss against its definition in NumPy, and its gradient against differences."""

import numpy as np
import paddle
import pytest

from finetune.settings.alignment import LOSS_TYPES
from finetune.training.preference.losses import PAIR_LOSSES, LossSettings, kto_losses, pair_losses

CHOSEN = np.array([-3.2, 0.4, -0.05, 7.5, -22.0, 0.0])
REJECTED = np.array([-5.0, 1.6, -0.04, -9.0, -2.5, 0.0])
SETTINGS = {"beta": 0.3, "label_smoothing": 0.15, "simpo_gamma": 0.7, "dpop_lambda": 5.0}


def sigma(x):
    return 1 / (1 + np.exp(-x))


def log_sigma(x):
    return -np.log1p(np.exp(-x))


def smoothed(x, share):
    return (share - 1) * log_sigma(x) - share * log_sigma(-x)


def divergence_of(first, second):
    """KL between two coins."""
    return first * np.log(first / second) + (1 - first) * np.log((1 - first) / (1 - second))


def odds(x):
    p = np.exp(x)
    return p / (1 - p)


def expected(loss_type, c, r, b=0.3, e=0.15, gamma=0.7, weight=5.0):
    d = b * (c - r)
    table = {
        "sigmoid": lambda: smoothed(d, e),
        "cpo": lambda: smoothed(d, e),
        "simpo": lambda: smoothed(d - gamma, e),
        "robust": lambda: ((1 - e) * -log_sigma(d) - e * -log_sigma(-d)) / (1 - 2 * e),
        "hinge": lambda: np.where(d < 1, 1 - d, 0),
        "ipo": lambda: (c - r - 0.5 / b) ** 2,
        "exo_pair": lambda: divergence_of(sigma(d), 1 - e),
        "nca_pair": lambda: -log_sigma(b * c) - (log_sigma(-b * c) + log_sigma(-b * r)) / 2,
        "sppo_hard": lambda: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
        "apo_zero": lambda: sigma(-b * c) + sigma(b * r),
        "apo_down": lambda: sigma(b * c) + sigma(-d),
        "dpop": lambda: -log_sigma(d) + weight * np.maximum(0, -c),
        "or": lambda: np.log1p(odds(r) / odds(c)),
        "orpo": lambda: b * np.log1p(odds(r) / odds(c)),
    }
    return table[loss_type]()


def values_for(loss_type):
    """Log ratios; odds need probabilities below 1."""
    if loss_type in ("or", "orpo"):
        return -np.abs(CHOSEN) - 0.01, -np.abs(REJECTED) - 0.02
    return CHOSEN, REJECTED


def test_every_loss_that_can_be_set_is_there():
    assert {*PAIR_LOSSES, "kto", "kto_pair", "reward"} == {*LOSS_TYPES}


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_losses_are_those_of_their_definitions(loss_type):
    chosen, rejected = values_for(loss_type)
    found = pair_losses(
        paddle.to_tensor(chosen, dtype="float32"),
        paddle.to_tensor(rejected, dtype="float32"),
        LossSettings(loss_type=loss_type, **SETTINGS),
    )
    np.testing.assert_allclose(found.numpy(), expected(loss_type, chosen, rejected), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_gradients_are_those_of_their_definitions(loss_type):
    values = values_for(loss_type)
    tensors = [paddle.to_tensor(value, dtype="float32", stop_gradient=False) for value in values]
    pair_losses(*tensors, LossSettings(loss_type=loss_type, **SETTINGS)).sum().backward()
    step = 1e-5
    for place in (0, 1):
        sides = []
        for sign in (1, -1):
            moved = [value.copy() for value in values]
            moved[place] += sign * step
            sides.append(expected(loss_type, *moved))
        slopes = (sides[0] - sides[1]) / (2 * step)
        is_smooth = ~((loss_type == "dpop") & (values[0] == 0))
        np.testing.assert_allclose(
            tensors[place].grad.numpy()[is_smooth], slopes[is_smooth], rtol=1e-3, atol=1e-4
        )


def test_exo_takes_a_small_smoothing_where_none_is_given():
    ratios = [paddle.to_tensor(value, dtype="float32") for value in (CHOSEN, REJECTED)]
    found = pair_losses(*ratios, LossSettings(loss_type="exo_pair", beta=0.3))
    np.testing.assert_allclose(found.numpy(), expected("exo_pair", CHOSEN, REJECTED, e=1e-3), rtol=1e-4)


def test_kto_weighs_both_kinds_and_compares_with_the_divergence():
    marks = np.array([1, 0, 1, 0, 0, 1])
    settings = LossSettings(loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    found = kto_losses(
        paddle.to_tensor(CHOSEN, dtype="float32"),
        paddle.to_tensor(marks, dtype="float32"),
        settings,
        paddle.to_tensor(0.8),
    )
    wanted = [
        1.5 * sigma(-0.3 * (ratio - 0.8)) if good else 0.5 * sigma(0.3 * (ratio - 0.8))
        for ratio, good in zip(CHOSEN, marks, strict=True)
    ]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-5, atol=1e-6)


def test_kto_pair_takes_the_divergence_of_the_other_half():
    ratios = [paddle.to_tensor(value, dtype="float32") for value in (CHOSEN, REJECTED)]
    settings = LossSettings(loss_type="kto_pair", beta=0.3)
    found = pair_losses(*ratios, settings, paddle.to_tensor([0.8, 0.1]))
    wanted = (sigma(-0.3 * (CHOSEN - 0.1)) + sigma(-0.3 * (0.8 - REJECTED))) / 2
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-5, atol=1e-6)


def test_odds_stay_finite_for_answers_that_are_certain():
    certain = paddle.zeros([1])
    certain.stop_gradient = False
    loss = pair_losses(certain, paddle.to_tensor([-3.0]), LossSettings(loss_type="orpo"))
    loss.sum().backward()
    assert np.isfinite(loss.numpy()).all() and np.isfinite(certain.grad.numpy()).all()
