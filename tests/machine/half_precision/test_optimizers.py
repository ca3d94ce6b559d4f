"""Paddle's optimizers on half-precision parameters, against NumPy."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from finetune.machine.half_precision.optimizers import SIGNATURES
from tests.machine.half_precision import cases
from tests.machine.half_precision.rounding import DTYPES, as_float32, rounded
from tests.machine.half_precision.tensors import dtype_of, tensor

IS_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
RATE, BETA1, BETA2, EPSILON, DECAY = 0.01, 0.9, 0.95, 1e-8, 0.1


class NumpyAdamW:
    """AdamW (Loshchilov and Hutter 2019) on a float32 weight."""

    def __init__(self, weight: np.ndarray):
        self.weight = weight.astype(np.float64)
        self.first, self.second, self.steps = np.zeros_like(self.weight), np.zeros_like(self.weight), 0

    def step(self, gradient: np.ndarray) -> None:
        self.steps += 1
        self.first = BETA1 * self.first + (1 - BETA1) * gradient
        self.second = BETA2 * self.second + (1 - BETA2) * np.square(gradient, dtype=np.float64)
        first = self.first / (1 - BETA1**self.steps)
        second = self.second / (1 - BETA2**self.steps)
        self.weight -= RATE * DECAY * self.weight
        self.weight -= RATE * first / (np.sqrt(second) + EPSILON)


def adamw(parameter, **options) -> paddle.optimizer.AdamW:
    return paddle.optimizer.AdamW(
        RATE, beta1=BETA1, beta2=BETA2, epsilon=EPSILON, weight_decay=DECAY, parameters=[parameter], **options
    )


def parameter_of(values: np.ndarray, dtype: str):
    parameter = paddle.create_parameter(list(values.shape), "float32")
    parameter.set_value(values)
    layer = paddle.nn.Layer()
    layer.weight = parameter
    return layer.to(dtype=dtype).weight


def set_gradient(parameter, gradient: np.ndarray, dtype: str) -> None:
    parameter.clear_gradient()
    (parameter * tensor(gradient, dtype_of(parameter))).sum().backward()
    if dtype != dtype_of(parameter):
        paddle.base.core.eager.set_master_grads([parameter])
    assert dtype_of(parameter.grad) == dtype


@pytest.mark.parametrize("float32_gradient", [False, True], ids=["gradient", "master_gradient"])
@IS_DTYPE
def test_adamw_with_master_weights(dtype, float32_gradient):
    start = rounded(cases.X, dtype)
    parameter = parameter_of(start, dtype)
    optimizer, reference = adamw(parameter, multi_precision=True), NumpyAdamW(start)
    for step in range(3):
        gradient = rounded(cases.values(4, 6, seed=10 + step), dtype)
        set_gradient(parameter, gradient, "float32" if float32_gradient else dtype)
        optimizer.step()
        reference.step(gradient)
    master = optimizer._master_weights[parameter.name]
    assert dtype_of(master) == "float32" and dtype_of(parameter) == dtype
    np.testing.assert_allclose(master.numpy(), reference.weight, rtol=2e-6, atol=1e-7)
    np.testing.assert_array_equal(as_float32(parameter.numpy()), rounded(master.numpy(), dtype))
    moments = optimizer._accumulators["moment1"]
    assert [dtype_of(moment) for moment in moments.values()] == ["float32"]
    np.testing.assert_allclose(next(iter(moments.values())).numpy(), reference.first, rtol=1e-5, atol=1e-7)


@IS_DTYPE
def test_adamw_without_master_weights_rounds_the_weight_every_step(dtype):
    start = rounded(cases.X, dtype)
    parameter = parameter_of(start, dtype)
    optimizer, reference = adamw(parameter, multi_precision=False), NumpyAdamW(start)
    for step in range(3):
        gradient = rounded(cases.values(4, 6, seed=20 + step), dtype)
        set_gradient(parameter, gradient, dtype)
        optimizer.step()
        reference.step(gradient)
        reference.weight = rounded(reference.weight, dtype).astype(np.float64)
    assert not optimizer._master_weights
    place = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    np.testing.assert_allclose(as_float32(parameter.numpy()), reference.weight, rtol=2 * place)


def test_small_updates_reach_the_master_weight_alone():
    parameter = parameter_of(np.float32([256.0]), "bfloat16")
    optimizer = paddle.optimizer.AdamW(0.01, weight_decay=0.0, parameters=[parameter], multi_precision=True)
    for _ in range(3):
        set_gradient(parameter, np.float32([1.0]), "bfloat16")
        optimizer.step()
    assert as_float32(parameter.numpy()) == 256.0
    np.testing.assert_allclose(optimizer._master_weights[parameter.name].numpy(), 256 - 0.03, rtol=1e-6)


OPTIMIZERS = {
    "sgd_": lambda **options: paddle.optimizer.SGD(0.1, **options),
    "momentum_": lambda **options: paddle.optimizer.Momentum(0.1, **options),
    "adam_": lambda **options: paddle.optimizer.Adam(0.1, **options),
    "adamw_": lambda **options: paddle.optimizer.AdamW(0.1, **options),
    "adagrad_": lambda **options: paddle.optimizer.Adagrad(0.1, **options),
    "adamax_": lambda **options: paddle.optimizer.Adamax(0.1, **options),
    "lamb_": lambda **options: paddle.optimizer.Lamb(0.1, **options),
    "rmsprop_": lambda **options: paddle.optimizer.RMSProp(0.1, **options),
}


@IS_DTYPE
@pytest.mark.parametrize("name", SIGNATURES)
def test_every_optimizer_moves_the_master_weight_as_it_moves_one_of_float32(name, dtype):
    start = rounded(cases.X, dtype)
    half, single = parameter_of(start, dtype), parameter_of(start, "float32")
    optimizers = [OPTIMIZERS[name](parameters=[half]), OPTIMIZERS[name](parameters=[single])]
    optimizers[0]._multi_precision = True
    for step in range(3):
        gradient = rounded(cases.values(4, 6, seed=30 + step), dtype)
        set_gradient(half, gradient, dtype)
        set_gradient(single, gradient, "float32")
        for optimizer in optimizers:
            optimizer.step()
    master = optimizers[0]._master_weights[half.name]
    np.testing.assert_array_equal(master.numpy(), single.numpy())
    np.testing.assert_array_equal(as_float32(half.numpy()), rounded(single.numpy(), dtype))
    assert not np.allclose(single.numpy(), start)


@IS_DTYPE
def test_a_step_that_is_to_be_skipped_changes_nothing(dtype):
    parameter = parameter_of(rounded(cases.X, dtype), dtype)
    optimizer = adamw(parameter, multi_precision=True)
    set_gradient(parameter, rounded(cases.Y, dtype), dtype)
    optimizer.step()
    before, master = parameter.numpy().copy(), optimizer._master_weights[parameter.name].numpy().copy()
    optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([True]))
    optimizer.step()
    np.testing.assert_array_equal(parameter.numpy(), before)
    np.testing.assert_array_equal(optimizer._master_weights[parameter.name].numpy(), master)
    optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([False]))
    optimizer.step()
    assert not np.array_equal(optimizer._master_weights[parameter.name].numpy(), master)


@IS_DTYPE
def test_gradients_are_clipped_by_their_norm(dtype):
    parameter = parameter_of(rounded(cases.X, dtype), dtype)
    optimizer = paddle.optimizer.SGD(
        1.0, parameters=[parameter], grad_clip=paddle.nn.ClipGradByGlobalNorm(0.5)
    )
    optimizer._multi_precision = True
    set_gradient(parameter, rounded(cases.Y, dtype), dtype)
    optimizer.step()
    moved = rounded(cases.X, dtype) - optimizer._master_weights[parameter.name].numpy()
    np.testing.assert_allclose(np.linalg.norm(moved), 0.5, rtol=0.02 if dtype == "bfloat16" else 0.003)


def test_float32_parameters_are_updated_by_paddles_own_kernel():
    parameter = parameter_of(cases.X, "float32")
    optimizer, reference = adamw(parameter), NumpyAdamW(cases.X)
    set_gradient(parameter, cases.Y, "float32")
    optimizer.step()
    reference.step(cases.Y)
    np.testing.assert_allclose(parameter.numpy(), reference.weight, rtol=2e-6, atol=1e-7)
