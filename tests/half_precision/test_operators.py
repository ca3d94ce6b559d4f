"""Operators compute in float32 and round: forward and gradient against NumPy."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle.autograd import PyLayer
from paddle.distributed.fleet.utils import recompute

from finetune.half_precision import half_precision_on_cpu, install, is_installed, uninstall
from finetune.half_precision.operators import MIXES, MOVES_DATA, PROMOTES
from tests.half_precision.conftest import DTYPES, draw, rounded, tensor, values

pytestmark = pytest.mark.usefixtures("half")


def check(dtype: str, compute, reference, *arrays: np.ndarray, tolerance: float = 0.0) -> None:
    """Compares a result and the gradients of its inputs with NumPy's, each rounded once.

    Args:
        dtype: Of the inputs.
        compute: From tensors to a tensor.
        reference: From float32 arrays to (result, function from the result's gradient to the inputs' gradients).
        arrays: The inputs before rounding.
        tolerance: In units of the last place of the type; 0 asks for equality.
    """
    inputs = [tensor(array, dtype) for array in arrays]
    exact = [rounded(array, dtype) for array in arrays]
    result = compute(*inputs)
    expected, gradients = reference(*exact)
    assert str(result.dtype).endswith(dtype)
    place = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    options = {"rtol": tolerance * place, "atol": tolerance * place * 1e-2}
    np.testing.assert_allclose(values(result), rounded(expected, dtype), **options)
    given = draw(*expected.shape, seed=9)
    result.backward(tensor(given, dtype, trained=False))
    for each, gradient in zip(inputs, gradients(rounded(given, dtype)), strict=True):
        assert str(each.grad.dtype).endswith(dtype)
        np.testing.assert_allclose(values(each.grad), rounded(gradient, dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_matrices(dtype):
    check(
        dtype,
        paddle.matmul,
        lambda a, b: (a @ b, lambda g: (g @ b.T, a.T @ g)),
        draw(5, 16),
        draw(16, 7, seed=1),
        tolerance=1.01,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide", "maximum"])
def test_elementwise_operators(dtype, name):
    rules = {
        "add": lambda a, b: (a + b, lambda g: (g, g)),
        "subtract": lambda a, b: (a - b, lambda g: (g, -g)),
        "multiply": lambda a, b: (a * b, lambda g: (g * b, g * a)),
        "divide": lambda a, b: (a / b, lambda g: (g / b, -g * a / (b * b))),
        "maximum": lambda a, b: (np.maximum(a, b), lambda g: (g * (a > b), g * (a <= b))),
    }
    check(dtype, getattr(paddle, name), rules[name], draw(6, 5), draw(6, 5, seed=1) + 3, tolerance=1.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_of_one_tensor(dtype):
    def softmax(x):
        y = np.exp(x - x.max(-1, keepdims=True))
        y /= y.sum(-1, keepdims=True)
        return y, lambda g: (y * (g - (g * y).sum(-1, keepdims=True)),)

    def silu(x):
        s = 1 / (1 + np.exp(-x))
        return x * s, lambda g: (g * (s + x * s * (1 - s)),)

    for compute, reference in (
        (lambda x: F.softmax(x, axis=-1), softmax),
        (F.silu, silu),
        (paddle.exp, lambda x: (np.exp(x), lambda g: (g * np.exp(x),))),
        (paddle.square, lambda x: (x * x, lambda g: (2 * g * x,))),
        (lambda x: x.sum(axis=0), lambda x: (x.sum(0), lambda g: (np.broadcast_to(g, x.shape),))),
        (lambda x: x.mean(axis=-1), lambda x: (x.mean(-1), lambda g: (g[:, None] / 8 + 0 * x,))),
        (lambda x: paddle.concat([x, x]), lambda x: (np.concatenate([x, x]), lambda g: (g[:4] + g[4:],))),
        (lambda x: x * 0.1, lambda x: (x * np.float32(0.1), lambda g: (g * np.float32(0.1),))),
    ):
        check(dtype, compute, reference, draw(4, 8), tolerance=2.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_take_float32_weights_and_keep_the_type_of_the_input(dtype):
    x, weight = draw(4, 16), draw(16, seed=1)
    half, wide = tensor(x, dtype), paddle.to_tensor(weight)
    result = F.layer_norm(half, [16], wide, paddle.zeros([16]))
    exact = rounded(x, dtype)
    normed = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    assert str(result.dtype).endswith(dtype)
    np.testing.assert_allclose(values(result), rounded(normed * weight, dtype), rtol=2.0**-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_looking_up_embeddings(dtype):
    ids, table = np.array([[1, 3, 1]]), draw(5, 4)
    weight = tensor(table, dtype)
    result = F.embedding(paddle.to_tensor(ids), weight)
    np.testing.assert_array_equal(values(result), rounded(table, dtype)[ids])
    given = draw(1, 3, 4, seed=2)
    result.backward(tensor(given, dtype, trained=False))
    expected = np.zeros((5, 4), np.float32)
    np.add.at(expected, ids, rounded(given, dtype))
    np.testing.assert_allclose(values(weight.grad), expected, rtol=2.0**-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_operator_told_the_type_of_its_result_obeys(dtype):
    x = tensor(draw(2000, scale=100.0), dtype)
    for asked in ("float32", "bfloat16", "float16"):
        result = x.sum(dtype=asked)
        assert str(result.dtype).endswith(asked)
    exact = rounded(draw(2000, scale=100.0), dtype).astype(np.float64).sum()
    assert float(x.sum(dtype="float32")) == pytest.approx(exact, rel=1e-5)
    assert F.softmax(x, dtype="float32").dtype == paddle.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranges(dtype):
    made = paddle.arange(0, 5, 1, dtype=dtype)
    assert str(made.dtype).endswith(dtype)
    np.testing.assert_array_equal(values(made), np.arange(5))


def test_types_are_promoted_where_paddle_promotes_and_refused_where_a_gpu_refuses():
    half, wide = tensor(draw(3, 3), "bfloat16"), paddle.to_tensor(draw(3, 3))
    assert (half + wide).dtype == paddle.float32
    assert (half * 2.0).dtype == paddle.bfloat16
    assert (half + 1).dtype == paddle.bfloat16
    for mixed in (lambda: half @ wide, lambda: paddle.matmul(wide, half), lambda: F.linear(half, wide)):
        with pytest.raises(
            TypeError, match=r"was given tensors of .*on a GPU its inputs must be of one dtype"
        ):
            mixed()


def test_every_operator_that_is_left_alone_has_its_kernels():
    """Forward and backward, in both types."""
    cases = {
        "cast": lambda x: x.astype("float32"),
        "reshape": lambda x: x.reshape([-1]),
        "transpose": lambda x: x.transpose([1, 0]),
        "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
        "flatten": lambda x: x.flatten(),
        "slice": lambda x: x[1:, :2],
        "strided_slice": lambda x: x[::2],
        "split": lambda x: paddle.split(x, [1, 3], axis=0)[1],
        "split_with_num": lambda x: paddle.split(x, 2, axis=0)[1],
        "stack": lambda x: paddle.stack([x, x]),
        "unbind": lambda x: paddle.unbind(x)[1],
        "assign": lambda x: paddle.assign(x),
        "contiguous": lambda x: x.transpose([1, 0]).contiguous(),
    }
    assert cases.keys() <= MOVES_DATA
    for dtype in DTYPES:
        for name, compute in cases.items():
            x = tensor(draw(4, 4), dtype)
            y = compute(x)
            y.backward(paddle.ones(y.shape, y.dtype))
            assert x.grad is not None and x.grad.dtype == x.dtype, name
    assert not MOVES_DATA & (PROMOTES | MIXES.keys())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_several_uses_are_added_in_the_type(dtype):
    x = tensor(draw(3), dtype)
    for factor in (1.0, 3.0):
        (x * factor).backward(paddle.ones([3], dtype))
    (x + x).backward(paddle.ones([3], dtype))
    assert values(x.grad).tolist() == [6.0, 6.0, 6.0]


class Scaled(PyLayer):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        return grad * weight, (grad * x).sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_python_and_recomputed_ones(dtype):
    results = []
    for run in (lambda layer, *args: layer(*args), lambda layer, *args: recompute(layer, *args)):
        x, weight = tensor(draw(6, 4), dtype), tensor(draw(4, seed=1), dtype)
        y = run(lambda a, b: F.silu(Scaled.apply(a, b)), x, weight)
        y.backward(paddle.ones(y.shape, dtype))
        results.append([values(each) for each in (y, x.grad, weight.grad)])
    for plain, again in zip(*results, strict=True):
        np.testing.assert_array_equal(plain, again)


def test_it_is_put_in_place_and_taken_away():
    assert is_installed()
    installed = paddle._C_ops.matmul
    install()
    with half_precision_on_cpu():
        assert paddle._C_ops.matmul is installed
    assert is_installed()
    uninstall()
    assert not is_installed() and paddle._C_ops.matmul is not installed
    with pytest.raises(RuntimeError, match="bfloat16"):
        paddle.matmul(tensor(draw(2, 2), "bfloat16"), tensor(draw(2, 2), "bfloat16"))


def test_float32_stays_what_it_is():
    a, b = draw(8, 8), draw(8, 8, seed=1)
    inside = paddle.matmul(paddle.to_tensor(a), paddle.to_tensor(b)).numpy()
    uninstall()
    np.testing.assert_array_equal(paddle.matmul(paddle.to_tensor(a), paddle.to_tensor(b)).numpy(), inside)
