"""Operators on half-precision tensors: values, gradients and dtypes.

The reference is the same operator in float32 on the same numbers, rounded by NumPy; and for one operator of each kind
its definition in NumPy.
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from finetune.machine.half_precision.operators import CHECKS_ITSELF, MOVES_DATA, PROMOTES, SCALARS_GIVE_WAY
from tests.machine.half_precision import cases
from tests.machine.half_precision.rounding import DTYPES, as_float32, rounded
from tests.machine.half_precision.tensors import tensor

IS_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def run(function, arrays, dtype, output_gradient):
    """An operator's result and the gradients of its inputs, and their dtypes."""
    inputs = [tensor(array, dtype, trained=True) for array in arrays]
    output = function(*inputs)
    paddle.autograd.backward([output], [tensor(output_gradient(output.shape), dtype)])
    found = [output, *(each.grad for each in inputs)]
    return [as_float32(each.numpy()) for each in found], [str(each.dtype) for each in found]


@IS_DTYPE
@pytest.mark.parametrize("name", cases.ALL)
def test_values_and_gradients_are_those_of_float32_rounded_once(name, dtype):
    function, arrays = cases.ALL[name]
    arrays = [rounded(array, dtype) for array in arrays]

    def output_gradient(shape):
        return rounded(cases.values(*shape, seed=9), dtype)

    found, dtypes = run(function, arrays, dtype, output_gradient)
    expected, _ = run(function, arrays, "float32", output_gradient)
    assert set(dtypes) == {f"paddle.{dtype}"}
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, rounded(other, dtype))


def near(found, expected, dtype) -> None:
    """Equal up to the last place: the reference may add in another order."""
    relative = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    np.testing.assert_allclose(as_float32(found.numpy()), expected, rtol=2 * relative, atol=1e-6)
    assert str(found.dtype) == f"paddle.{dtype}"


@IS_DTYPE
def test_matrix_product_against_numpy(dtype):
    x, y, gradient = (rounded(array, dtype) for array in (cases.X, cases.SQUARE, cases.Y))
    a, b = tensor(x, dtype, trained=True), tensor(y, dtype, trained=True)
    product = paddle.matmul(a, b)
    product.backward(tensor(gradient, dtype))
    near(product, rounded(x @ y, dtype), dtype)
    near(a.grad, rounded(gradient @ y.T, dtype), dtype)
    near(b.grad, rounded(x.T @ gradient, dtype), dtype)


@IS_DTYPE
def test_softmax_against_numpy(dtype):
    x, gradient = rounded(cases.X, dtype), rounded(cases.Y, dtype)
    a = tensor(x, dtype, trained=True)
    output = F.softmax(a, -1)
    output.backward(tensor(gradient, dtype))
    exact = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    near(output, rounded(exact, dtype), dtype)
    # The backward pass has the probabilities that the forward pass computed, before they were rounded.
    near(a.grad, rounded(exact * (gradient - (gradient * exact).sum(-1, keepdims=True)), dtype), dtype)


@IS_DTYPE
def test_layer_norm_against_numpy_with_weights_of_float32(dtype):
    x, gradient, weight = rounded(cases.X, dtype), rounded(cases.Y, dtype), cases.ROW
    a, w = tensor(x, dtype, trained=True), tensor(weight, "float32", trained=True)
    output = F.layer_norm(a, [6], w, paddle.zeros([6]), 1e-5)
    output.backward(tensor(gradient, dtype))
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = (x - x.mean(-1, keepdims=True)) / deviation
    inner = gradient * weight
    by_x = (
        inner - inner.mean(-1, keepdims=True) - normed * (inner * normed).mean(-1, keepdims=True)
    ) / deviation
    near(output, rounded(normed * weight, dtype), dtype)
    near(a.grad, rounded(by_x, dtype), dtype)
    assert w.grad.dtype == paddle.float32
    np.testing.assert_allclose(w.grad.numpy(), (gradient * normed).sum(0), rtol=1e-5, atol=1e-5)


@IS_DTYPE
def test_elementwise_and_broadcast_gradients_against_numpy(dtype):
    x, row, gradient = (rounded(array, dtype) for array in (cases.X, cases.ROW, cases.Y))
    a, b = tensor(x, dtype, trained=True), tensor(row, dtype, trained=True)
    product = a * b
    product.backward(tensor(gradient, dtype))
    np.testing.assert_array_equal(as_float32(product.numpy()), rounded(x * row, dtype))
    np.testing.assert_array_equal(as_float32(a.grad.numpy()), rounded(gradient * row, dtype))
    near(b.grad, rounded((gradient * x).sum(0), dtype), dtype)


@IS_DTYPE
def test_embedding_gradients_of_a_repeated_token_are_added_in_float32(dtype):
    large, count = (256.0, 8) if dtype == "bfloat16" else (2048.0, 8)
    table = tensor(np.zeros((2, 1)), dtype, trained=True)
    rows = F.embedding(paddle.to_tensor([1] * (count + 1)), table)
    rows.backward(tensor([[large]] + [[0.5]] * count, dtype))
    assert as_float32(table.grad.numpy()).tolist() == [[0.0], [large + 4]]


@IS_DTYPE
def test_gradients_of_several_uses_are_added_in_half_precision(dtype):
    """As Paddle does on a GPU: each use has its gradient rounded, and the sum is rounded again."""
    x = tensor([3.0], dtype, trained=True)
    factors = [tensor([value], dtype) for value in ((256.0, 1.0) if dtype == "bfloat16" else (2048.0, 1.0))]
    paddle.autograd.backward([x * factors[0], x * factors[1]])
    assert as_float32(x.grad.numpy()) == as_float32(factors[0].numpy())


@IS_DTYPE
def test_rounding_is_to_nearest_ties_to_even(dtype):
    step = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    values = np.float32(
        [1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 1e-6, -1 - step / 2, np.inf, -np.inf, np.nan]
    )
    found = as_float32((paddle.to_tensor(values) * 1.0).astype(dtype).numpy())
    np.testing.assert_array_equal(found, [1, 1 + 2 * step, 1 + step, -1, np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(found, rounded(values, dtype))


# Dtypes that are asked for


@IS_DTYPE
def test_a_dtype_argument_decides(dtype):
    large, one = (256.0, 1.0) if dtype == "bfloat16" else (2048.0, 1.0)
    x = tensor([large, one], dtype)
    assert float(x.sum(dtype="float32")) == large + one
    assert x.sum(dtype="float32").dtype == x.cumsum(dtype="float32").dtype == paddle.float32
    assert F.softmax(x, dtype="float32").dtype == paddle.float32
    assert x.sum().dtype == x.cumsum().dtype == x.dtype
    assert as_float32(x.sum().numpy()) == large
    wide = paddle.to_tensor([large, one + large])
    assert str(wide.sum(dtype=dtype).dtype) == str(x.dtype)
    # The input is rounded before the sum, not the sum alone.
    assert as_float32(wide.sum(dtype=dtype).numpy()) == 2 * large
    assert F.one_hot(paddle.to_tensor([1]), 3).dtype == paddle.float32
    assert x.argmax().dtype == paddle.int64
    assert paddle.full_like(x, 2.0, dtype="float32").dtype == paddle.float32


CREATED = {
    "arange": lambda dtype: paddle.arange(0, 2, 0.25, dtype=dtype),
    "linspace": lambda dtype: paddle.linspace(0, 1, 7, dtype=dtype),
    "full": lambda dtype: paddle.full([7], 0.3, dtype=dtype),
    "ones": lambda dtype: paddle.ones([7], dtype=dtype),
    "eye": lambda dtype: paddle.eye(7, dtype=dtype),
    "to_tensor": lambda dtype: paddle.to_tensor([0.1, 0.3], dtype=dtype),
    "rand": lambda dtype: paddle.rand([7], dtype=dtype),
    "randn": lambda dtype: paddle.randn([7], dtype=dtype),
    "tril": lambda dtype: paddle.tril(paddle.ones([3, 3], dtype=dtype)),
}


@IS_DTYPE
@pytest.mark.parametrize("name", CREATED)
def test_tensors_are_made_in_half_precision(name, dtype):
    def make(wanted: str) -> paddle.Tensor:
        paddle.seed(3)
        return CREATED[name](wanted)

    found = make(dtype)
    assert str(found.dtype) == f"paddle.{dtype}"
    if not name.startswith("rand"):  # Paddle's own kernels draw these, in half precision
        np.testing.assert_array_equal(as_float32(found.numpy()), rounded(make("float32").numpy(), dtype))


@IS_DTYPE
def test_numbers_of_a_power_and_a_scale_may_be_tensors(dtype):
    x = tensor(cases.POSITIVE, dtype)
    bound, factor = paddle.to_tensor(1.0), paddle.to_tensor(2.0)
    assert x.clip(max=bound).dtype == paddle.scale(x, factor).dtype == x.dtype


# Dtypes that meet


REFUSED = {
    "matmul": lambda x, y: paddle.matmul(x, y.T),
    "operator": lambda x, y: x @ y.T,
    "bmm": lambda x, y: paddle.bmm(x.unsqueeze(0), y.T.unsqueeze(0)),
    "linear": lambda x, y: F.linear(x, y.T),
    "linear_bias": lambda x, y: F.linear(x, x.T, y[:, 0]),
    "concat": lambda x, y: paddle.concat([x, y]),
    "stack": lambda x, y: paddle.stack([x, y]),
    "einsum": lambda x, y: paddle.einsum("ij,kj->ik", x, y),
    "addmm": lambda x, y: paddle.addmm(y @ y.T, x, x.T),
    "put_along_axis": lambda x, y: paddle.put_along_axis(x, paddle.to_tensor([[0]] * 4), y[:, :1], 1),
    "scatter": lambda x, y: paddle.scatter(x, paddle.to_tensor([0]), y[:1]),
    "layer_norm": lambda x, y: F.layer_norm(y, [6], x[0], x[1]),
    "swiglu": lambda x, y: F.swiglu(x, y),
}


@IS_DTYPE
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses_is_refused(name, dtype):
    with pytest.raises((TypeError, ValueError), match=r"(?i)dtype|data_type"):
        REFUSED[name](tensor(cases.X, dtype), tensor(cases.Y, "float32"))


def test_bfloat16_and_float16_do_not_multiply():
    with pytest.raises(TypeError, match="matmul was given tensors of bfloat16, float16"):
        tensor(cases.X, "bfloat16") @ tensor(cases.X, "float16").T


def promoted(name: str, x: paddle.Tensor, y: paddle.Tensor) -> paddle.Tensor:
    operator = getattr(paddle._C_ops, name)
    if name == "where":
        return operator(paddle.ones(x.shape, "bool"), x, y)
    result = operator(x, y, *{"huber_loss": (1.0,), "cross": (1,)}.get(name, ()))
    return result[0] if isinstance(result, list | tuple) else result


@IS_DTYPE
@pytest.mark.parametrize("name", sorted(PROMOTES))
def test_half_beside_float32_promotes_as_float32_beside_float64_does(name, dtype):
    """Paddle's own decision is seen where CPU has kernels for both dtypes."""
    shape = [2, 3]
    wide = paddle.full(shape, 2.0, "float64")
    names = {
        "paddle.float32": f"paddle.{dtype}",
        "paddle.float64": "paddle.float32",
        "paddle.bool": "paddle.bool",
    }
    half, single = tensor(np.full(shape, 2.0), dtype), paddle.full(shape, 2.0)
    for x, y, x32, y64 in ((half, single, single, wide), (single, half, wide, single)):
        assert str(promoted(name, x, y).dtype) == names[str(promoted(name, x32, y64).dtype)]
    if name in SCALARS_GIVE_WAY or name in ("maximum", "fmax", "floor_divide"):
        scalar = promoted(name, single, paddle.to_tensor(2.0, dtype="float64"))
        assert str(promoted(name, half, paddle.to_tensor(2.0)).dtype) == names[str(scalar.dtype)]
        assert str(promoted(name, paddle.to_tensor(2.0), half).dtype) == names[str(scalar.dtype)]
    assert str(promoted(name, half, half).dtype) in (f"paddle.{dtype}", "paddle.bool")


def test_a_scalar_tensor_is_rounded_before_it_is_used():
    x = tensor([1.0], "bfloat16")
    assert float(x * paddle.to_tensor(1.0 + 2.0**-9)) == 1.0
    assert bool((x == paddle.to_tensor(1.0 + 2.0**-9)).all())


def test_bfloat16_and_float16_together_become_float32():
    assert (tensor([1.0], "bfloat16") + tensor([2.0], "float16")).dtype == paddle.float32


def test_half_precision_beside_integers_is_refused_as_in_float32():
    integers = paddle.ones([4, 6], "int64")
    with pytest.raises(TypeError, match="Type promotion only support"):
        tensor(cases.X, "bfloat16") + integers


# The tables


def has_cpu_kernels(name: str) -> bool:
    registered = paddle.base.core._get_registered_phi_kernels()
    keys = registered.get(name)
    return keys is None or all(any("CPU" in key and f" {dtype})" in key for key in keys) for dtype in DTYPES)


# Paddle has no kernel of this name, or one for all dtypes.
WITHOUT_DTYPE = {"shape"}


@pytest.mark.parametrize(
    "name", sorted((MOVES_DATA | CHECKS_ITSELF) - WITHOUT_DTYPE - {"share_data", "share_data_"})
)
def test_what_is_called_as_it_is_has_kernels_for_half_precision(name):
    base = name.removesuffix("_")
    assert has_cpu_kernels(base) and has_cpu_kernels(f"{base}_grad")


def test_shapes_cost_no_conversion():
    assert paddle.shape(tensor(cases.X, "bfloat16")).tolist() == [4, 6]


def test_operators_that_no_table_knows_compute_and_round():
    x = tensor(cases.POSITIVE, "bfloat16")
    found = paddle.digamma(x)
    np.testing.assert_array_equal(
        as_float32(found.numpy()), rounded(paddle.digamma(x.astype("float32")).numpy(), "bfloat16")
    )


@IS_DTYPE
def test_comparisons_and_checks_return_booleans(dtype):
    x, y = tensor(cases.X, dtype), tensor(cases.Y, dtype)
    a, b = as_float32(x.numpy()), as_float32(y.numpy())
    np.testing.assert_array_equal((x > y).numpy(), a > b)
    np.testing.assert_array_equal((x <= 0.3).numpy(), a <= rounded(np.float32(0.3), dtype))
    np.testing.assert_array_equal((x == x).numpy(), np.ones_like(a, bool))
    assert bool(paddle.isfinite(x).all()) and not bool(paddle.isnan(x).any())
    assert bool(paddle.allclose(x, x)) and not bool(paddle.equal_all(x, y))
