"""`paddle.amp.GradScaler` on half-precision gradients."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from tests.machine.half_precision import cases
from tests.machine.half_precision.rounding import DTYPES, as_float32, rounded
from tests.machine.half_precision.tensors import tensor

IS_DTYPE = pytest.mark.parametrize("dtype", [*DTYPES, "float32"])


def check(gradients, scale: float):
    found = paddle.to_tensor([False])
    paddle._legacy_C_ops.check_finite_and_unscale(gradients, paddle.to_tensor([scale]), gradients, found)
    return bool(found)


@IS_DTYPE
def test_gradients_are_divided_and_rounded(dtype):
    values = cases.X if dtype == "float32" else rounded(cases.X, dtype)
    gradients = [tensor(values, dtype), tensor(values[0], dtype)]
    assert check(gradients, 3.0) is False
    expected = values * np.float32(1 / np.float32(3.0))
    found = as_float32(gradients[0].numpy())
    if dtype != "float32":
        expected = rounded(expected, dtype)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(as_float32(gradients[1].numpy()), expected[0])


@IS_DTYPE
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_found(dtype, bad):
    values = np.ones((2, 3), np.float32)
    values[1, 2] = bad
    assert check([tensor(np.ones(4), dtype), tensor(values, dtype)], 1024.0) is True


def test_what_overflows_when_it_is_divided_is_found():
    assert check([tensor([60000.0], "float16")], 0.5) is True
    assert check([tensor([60000.0], "float32")], 0.5) is False


@IS_DTYPE
def test_the_operator_of_the_same_name(dtype):
    gradients = [tensor([2.0, 4.0], dtype)]
    outputs, found = paddle._C_ops.check_finite_and_unscale_(gradients, paddle.to_tensor([2.0]))
    assert as_float32(outputs[0].numpy()).tolist() == [1.0, 2.0] and not bool(found)


@pytest.fixture
def training(recwarn):
    """A float16 layer with its optimizer and scaler."""
    paddle.seed(1)
    layer = paddle.nn.Linear(6, 6)
    optimizer = paddle.optimizer.AdamW(0.1, parameters=layer.parameters())
    layer, optimizer = paddle.amp.decorate(layer, optimizer, level="O2", dtype="float16")
    scaler = paddle.amp.GradScaler(init_loss_scaling=1024.0, decr_every_n_nan_or_inf=1, incr_every_n_steps=2)
    assert scaler.is_enable()
    return layer, optimizer, scaler


def step(layer, optimizer, scaler, factor: float) -> None:
    with paddle.amp.auto_cast(level="O2", dtype="float16"):
        loss = layer(tensor(cases.X, "float16")).astype("float32").sum() * factor
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.clear_grad()


def test_an_overflow_skips_the_step_and_halves_the_scale(training, capsys):
    layer, optimizer, scaler = training
    before = layer.weight.numpy().copy()
    step(layer, optimizer, scaler, 1e6)  # 1024 * 1e6 is beyond float16
    np.testing.assert_array_equal(layer.weight.numpy(), before)
    assert float(scaler._scale) == 512.0
    step(layer, optimizer, scaler, 1.0)
    assert not np.array_equal(layer.weight.numpy(), before)
    step(layer, optimizer, scaler, 1.0)
    assert float(scaler._scale) == 1024.0


def test_the_scale_does_not_change_the_step(training):
    layer, optimizer, scaler = training
    gradients = []
    for scale in (1024.0, 2048.0):
        scaler.set_init_loss_scaling(scale)
        with paddle.amp.auto_cast(level="O2", dtype="float16"):
            loss = layer(tensor(cases.X, "float16")).astype("float32").mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(layer.weight.grad.numpy())
        scaler.step(optimizer)
        scaler.update()
        optimizer.clear_grad()
        np.testing.assert_allclose(gradients[-1], gradients[0], rtol=1e-3, atol=1e-6)
    assert np.isfinite(gradients[0]).all() and gradients[0].any()
