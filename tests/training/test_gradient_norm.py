"""Clipping by global norm."""

import math

import pytest

from finetune.training.gradient_norm import clip_factor


@pytest.mark.parametrize(
    ("norm", "max_norm", "factor"),
    [(2.0, 1.0, 0.5), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (5.0, 0.0, 1.0), (5.0, -1.0, 1.0)],
)
def test_gradients_are_scaled_down_to_the_limit_and_never_up(norm, max_norm, factor):
    assert clip_factor(norm, max_norm) == factor


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_the_factor_of_a_norm_that_is_no_number_is_none_either(norm):
    assert math.isnan(clip_factor(norm, 1.0))
