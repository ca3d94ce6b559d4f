"""Clipping by global norm, and what happens to numbers that are none."""

import math
from types import SimpleNamespace

import pytest

from finetune.training.gradient_norm import clip_factor
from finetune.training.trainer import FinetuneTrainer


@pytest.mark.parametrize(
    ("norm", "max_norm", "factor"),
    [(2.0, 1.0, 0.5), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (5.0, 0.0, 1.0), (5.0, -1.0, 1.0)],
)
def test_gradients_are_scaled_down_to_the_limit_and_never_up(norm, max_norm, factor):
    assert clip_factor(norm, max_norm) == factor


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_an_overflow_reaches_the_loss_scaler(norm):
    assert math.isnan(clip_factor(norm, 1.0))


@pytest.mark.parametrize(
    ("loss", "norm", "scaled", "words"),
    [
        (math.nan, 1.0, False, "loss of step 8 is nan"),
        (math.inf, 1.0, True, "loss of step 8 is inf"),
        (1.0, math.nan, False, "gradient norm of step 8 is nan"),
        (1.0, math.inf, True, None),
        (1.0, 1.0, False, None),
    ],
)
def test_a_step_without_a_number_never_reaches_the_weights(loss, norm, scaled, words):
    trainer = SimpleNamespace(_norm=norm, do_grad_scaling=scaled)
    if words is None:
        FinetuneTrainer._check_finite(trainer, loss, 7)
        return
    with pytest.raises(FloatingPointError, match=words):
        FinetuneTrainer._check_finite(trainer, loss, 7)
