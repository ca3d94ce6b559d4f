"""Layers, recomputation and functions with gradients of their own, in half precision."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle.autograd import PyLayer
from paddle.distributed.fleet.utils import recompute

from tests.machine.half_precision import cases
from tests.machine.half_precision.rounding import DTYPES, as_float32, rounded
from tests.machine.half_precision.tensors import dtype_of, tensor

IS_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


class Square(PyLayer):
    """x^2, with a gradient that is told from the true one by its factor."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensor()
        return gradient * x * 4.0


@IS_DTYPE
def test_functions_with_gradients_of_their_own(dtype):
    x = tensor(cases.X, dtype, trained=True)
    output = Square.apply(x)
    output.backward(tensor(cases.Y, dtype))
    assert dtype_of(output) == dtype_of(x.grad) == dtype
    values, gradient = rounded(cases.X, dtype), rounded(cases.Y, dtype)
    np.testing.assert_array_equal(as_float32(output.numpy()), rounded(values * values, dtype))
    expected = rounded(rounded(gradient * values, dtype) * 4, dtype)
    np.testing.assert_array_equal(as_float32(x.grad.numpy()), expected)


class Block(paddle.nn.Layer):
    """A block with what a decoder layer has."""

    def __init__(self):
        super().__init__()
        self.up, self.down = paddle.nn.Linear(6, 8), paddle.nn.Linear(8, 6)
        self.norm = paddle.nn.LayerNorm(6)

    def forward(self, x):
        return x + self.down(F.dropout(F.silu(self.up(self.norm(x))), 0.3, training=self.training))


def gradients(block, dtype: str, level: str, run) -> list[np.ndarray]:
    x = tensor(cases.X, dtype if level == "O2" else "float32", trained=True)
    paddle.seed(7)
    with paddle.amp.auto_cast(level=level, dtype=dtype, custom_black_list=["silu"]):
        loss = run(block, x).astype("float32").square().sum()
    loss.backward()
    result = [loss.numpy(), as_float32(x.grad.numpy())]
    result += [as_float32(each.grad.numpy()) for each in block.parameters()]
    block.clear_gradients()
    return result


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("level", ["O1", "O2"])
@IS_DTYPE
def test_recomputation_repeats_dtypes_and_dropout(dtype, level, reentrant):
    paddle.seed(3)
    block = Block()
    if level == "O2":
        block = paddle.amp.decorate(block, level="O2", dtype=dtype)
    plain = gradients(block, dtype, level, lambda layer, x: layer(x))
    again = gradients(block, dtype, level, lambda layer, x: recompute(layer, x, use_reentrant=reentrant))
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_array_equal(one, other)


@IS_DTYPE
def test_gradients_of_micro_batches_are_added_in_the_dtype_of_the_weight(dtype):
    weight = tensor([1.0], dtype, trained=True)
    large = 256.0 if dtype == "bfloat16" else 2048.0
    for factor in (large, 1.0, 3.0):
        (weight * tensor([factor], dtype)).sum().backward()
    assert as_float32(weight.grad.numpy()) == rounded(np.float32(large + 3), dtype)


@IS_DTYPE
def test_a_layer_is_made_in_half_precision_from_the_start(dtype):
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(dtype)
    try:
        block = Block()
    finally:
        paddle.set_default_dtype(before)
    assert {dtype_of(each) for each in block.parameters()} == {dtype}
    assert np.ptp(as_float32(block.up.weight.numpy())) > 0
    output = block(tensor(cases.X, dtype))
    assert dtype_of(output) == dtype and np.isfinite(as_float32(output.numpy())).all()


@IS_DTYPE
def test_attention(dtype):
    paddle.seed(2)
    query, key, value = (tensor(cases.values(2, 5, 2, 4, seed=s), dtype, trained=True) for s in range(3))
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    output.sum().backward()
    assert {dtype_of(each) for each in (output, query.grad, key.grad, value.grad)} == {dtype}
    single = F.scaled_dot_product_attention(
        *(each.detach().astype("float32") for each in (query, key, value)), is_causal=True
    )
    place = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    np.testing.assert_allclose(as_float32(output.numpy()), single.numpy(), rtol=8 * place, atol=4 * place)


@IS_DTYPE
def test_dropout_keeps_the_dtype_and_the_mean(dtype):
    x = paddle.ones([4000], dtype)
    output = F.dropout(x, 0.5)
    assert dtype_of(output) == dtype and set(as_float32(output.numpy())) == {0.0, 2.0}
