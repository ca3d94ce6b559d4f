"""Paddle's AdamW with master weights, and its GradScaler."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest

from tests.half_precision.conftest import DTYPES, draw, rounded, tensor, values

pytestmark = pytest.mark.usefixtures("half")
RATE, DECAY, BETAS, EPSILON = 1e-2, 0.1, (0.9, 0.999), 1e-8


def parameter_of(array: np.ndarray, dtype: str) -> paddle.Tensor:
    """A parameter as a layer has it after `paddle.amp.decorate`."""
    layer = paddle.nn.Embedding(*np.atleast_2d(array).shape)
    layer.weight.set_value(np.atleast_2d(array))
    paddle.amp.decorate(models=layer, level="O2", dtype=dtype)
    return layer.weight


def adamw(weight: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """Loshchilov and Hutter's AdamW in float64."""
    weight, first, second = weight.astype(np.float64), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        weight = weight * (1 - RATE * DECAY)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        unbiased = math.sqrt(1 - BETAS[1] ** step)
        weight = weight - RATE * (first / (1 - BETAS[0] ** step)) / (np.sqrt(second) / unbiased + EPSILON)
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient_dtype", ["same", "float32"])
def test_adamw_updates_the_master_weight_and_rounds_it_into_the_parameter(dtype, gradient_dtype):
    start = rounded(draw(6, 5), dtype)
    gradients = [draw(6, 5, seed=step, scale=0.1) for step in (1, 2, 3)]
    kind = dtype if gradient_dtype == "same" else "float32"
    parameter = parameter_of(start, dtype)
    optimizer = paddle.optimizer.AdamW(RATE, parameters=[parameter], weight_decay=DECAY, multi_precision=True)
    for gradient in gradients:
        parameter.grad = tensor(np.atleast_2d(gradient), kind, trained=False)
        optimizer.step()
    exact = gradients if kind == "float32" else [rounded(each, dtype) for each in gradients]
    master = optimizer._master_weights[parameter.name]
    assert master.dtype == paddle.float32
    np.testing.assert_allclose(master.numpy(), adamw(start, exact), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(values(parameter), rounded(master.numpy(), dtype))
    moments = optimizer._accumulators["moment1"]
    assert [each.dtype for each in moments.values()] == [paddle.float32]


def test_small_updates_are_not_lost():
    """In bfloat16 alone 1 + 0.001 is 1; the master weight remembers."""
    parameter = parameter_of(np.ones(4, np.float32), "bfloat16")
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=[parameter], weight_decay=0.0, multi_precision=True)
    for _ in range(20):
        parameter.grad = paddle.ones([1, 4], "bfloat16")
        optimizer.step()
    np.testing.assert_allclose(values(parameter), np.full((1, 4), 0.98), atol=2.0**-8)


@pytest.mark.parametrize("bad", [math.inf, math.nan, None])
def test_gradients_that_overflow_are_found_and_the_step_is_skipped(bad):
    start = draw(4)
    parameter = parameter_of(start, "float16")
    optimizer = paddle.optimizer.AdamW(RATE, parameters=[parameter], multi_precision=True)
    scaler = paddle.amp.GradScaler(init_loss_scaling=256.0)
    gradient = np.full(4, 512.0, np.float32)
    if bad is not None:
        gradient[2] = bad
    parameter.grad = tensor(gradient[None], "float16", trained=False)
    scaler.unscale_(optimizer)
    if bad is None:
        assert values(parameter.grad).tolist() == [[2.0] * 4]
    scaler.step(optimizer)
    scaler.update()
    changed = not np.array_equal(values(parameter), rounded(start[None], "float16"))
    assert changed == (bad is None)
    assert float(scaler._scale) == (256.0 if bad is None else 128.0)


def test_the_scale_reaches_the_gradients_and_goes_again():
    weight = parameter_of(np.ones(3, np.float32), "float16")
    scaler = paddle.amp.GradScaler(init_loss_scaling=1024.0)
    optimizer = paddle.optimizer.AdamW(RATE, parameters=[weight], multi_precision=True)
    with paddle.amp.auto_cast(level="O2", dtype="float16"):
        loss = (weight * 2.0).astype("float32").sum()
    scaler.scale(loss).backward()
    assert values(weight.grad).tolist() == [[2048.0] * 3]
    scaler.unscale_(optimizer)
    assert values(weight.grad).tolist() == [[2.0] * 3]
