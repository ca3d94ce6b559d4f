"""Arithmetic with numbers, writing into tensors, and indexing."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from tests.machine.half_precision import cases
from tests.machine.half_precision.rounding import DTYPES, as_float32, rounded
from tests.machine.half_precision.tensors import dtype_of, tensor

IS_DTYPE = pytest.mark.parametrize("dtype", DTYPES)

WITH_NUMBERS = {
    "+": (lambda x, n: x + n, 0.3),
    "reversed +": (lambda x, n: n + x, 0.3),
    "-": (lambda x, n: x - n, 0.3),
    "reversed -": (lambda x, n: n - x, 0.3),
    "*": (lambda x, n: x * n, 0.3),
    "reversed *": (lambda x, n: n * x, 0.3),
    "/": (lambda x, n: x / n, 0.3),
    "**": (lambda x, n: x**n, 2),
    "+ integer": (lambda x, n: x + n, 3),
    "+ numpy": (lambda x, n: x + np.float32(n), 0.3),
    "+ boolean": (lambda x, n: x + n, True),
}
"""The number takes part as it is."""

WITH_ROUNDED_NUMBERS = {
    "reversed /": (lambda x, n: n / x, 0.3),
    "reversed **": (lambda x, n: n**x, 1.3),
    "//": (lambda x, n: x // n, 0.3),
    "%": (lambda x, n: x % n, 0.3),
    ">": (lambda x, n: (x > n).astype("float32"), 0.3),
    "==": (lambda x, n: (x == n).astype("float32"), 0.3),
}
"""The number becomes a tensor of the dtype first."""


@IS_DTYPE
@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_arithmetic_with_numbers(name, dtype):
    function, number = WITH_NUMBERS[name]
    x = rounded(cases.POSITIVE, dtype)
    found = function(tensor(x, dtype), number)
    assert dtype_of(found) == dtype
    np.testing.assert_array_equal(
        as_float32(found.numpy()), rounded(function(tensor(x, "float32"), number).numpy(), dtype)
    )


@IS_DTYPE
@pytest.mark.parametrize("name", WITH_ROUNDED_NUMBERS)
def test_arithmetic_with_numbers_that_become_tensors(name, dtype):
    function, number = WITH_ROUNDED_NUMBERS[name]
    x = rounded(cases.POSITIVE, dtype)
    x[0, 0] = near = float(rounded(np.float32(number), dtype))
    found = function(tensor(x, dtype), number)
    expected = function(tensor(x, "float32"), near)
    np.testing.assert_array_equal(as_float32(found.numpy()), rounded(expected.numpy(), dtype))


def test_comparison_with_something_else_is_paddles():
    assert (tensor([1.0], "bfloat16") == None) is False  # noqa: E711


@IS_DTYPE
def test_arrays_count_as_tensors(dtype):
    assert dtype_of(tensor([1.0, 2.0], dtype) * np.float32([0.5, 0.5])) == "float32"


IN_PLACE = {
    "add_": (lambda x, y: x.add_(y), lambda x, y: x + y),
    "subtract_": (lambda x, y: x.subtract_(y), lambda x, y: x - y),
    "multiply_": (lambda x, y: x.multiply_(y), lambda x, y: x * y),
    "divide_": (lambda x, y: x.divide_(y), lambda x, y: x / y),
    "scale_": (lambda x, y: x.scale_(0.3), lambda x, y: x * 0.3),
    "clip_": (lambda x, y: x.clip_(-0.5, 0.5), lambda x, y: x.clip(-0.5, 0.5)),
    "exp_": (lambda x, y: x.exp_(), lambda x, y: x.exp()),
    "tanh_": (lambda x, y: x.tanh_(), lambda x, y: x.tanh()),
    "relu_": (lambda x, y: paddle.nn.functional.relu_(x), lambda x, y: paddle.nn.functional.relu(x)),
    "softmax_": (lambda x, y: paddle.nn.functional.softmax_(x), lambda x, y: paddle.nn.functional.softmax(x)),
    "cumsum_": (lambda x, y: x.cumsum_(-1), lambda x, y: x.cumsum(-1)),
    "tril_": (lambda x, y: x.tril_(), lambda x, y: x.tril()),
    "masked_fill_": (lambda x, y: x.masked_fill_(y > 0, 0.3), lambda x, y: x.masked_fill(y > 0, 0.3)),
    "reshape_": (lambda x, y: x.reshape_([3, 8]), lambda x, y: x.reshape([3, 8])),
    "lerp_": (lambda x, y: x.lerp_(y, 0.5), lambda x, y: x.lerp(y, 0.5)),
    "index_add_": (
        lambda x, y: x.index_add_(paddle.to_tensor([0, 0]), 0, y[:2]),
        lambda x, y: paddle.index_add(x, paddle.to_tensor([0, 0]), 0, y[:2]),
    ),
    "put_along_axis_": (
        lambda x, y: x.put_along_axis_(paddle.to_tensor([[1]] * 4), y[:, :1], 1),
        lambda x, y: x.put_along_axis(paddle.to_tensor([[1]] * 4), y[:, :1], 1),
    ),
    "where_": (
        lambda x, y: paddle.where_(paddle.to_tensor(cases.MASK), x, y),
        lambda x, y: paddle.where(paddle.to_tensor(cases.MASK), x, y),
    ),
}


@IS_DTYPE
@pytest.mark.parametrize("name", IN_PLACE)
def test_writing_into_a_tensor_gives_what_a_new_tensor_would_hold(name, dtype):
    write, make = IN_PLACE[name]
    gradients = []
    for function, in_place in ((write, True), (make, False)):
        x, y = (tensor(rounded(array, dtype), dtype, trained=True) for array in (cases.X, cases.Y))
        work = x * 1.0
        result = function(work, y)
        assert dtype_of(result) == dtype
        if in_place:
            assert result is work
        (result * tensor(rounded(cases.values(*result.shape, seed=5), dtype), dtype)).sum().backward()
        gradients.append([result, x.grad, *([y.grad] if y.grad is not None else [])])
    for written, made in zip(*gradients, strict=True):
        np.testing.assert_array_equal(as_float32(written.numpy()), as_float32(made.numpy()))


@IS_DTYPE
def test_a_parameter_is_written_without_gradient(dtype):
    x = tensor([1.0, 2.0], dtype, trained=True)
    with pytest.raises((RuntimeError, ValueError), match="Leaf"):
        x.add_(tensor([1.0, 1.0], dtype))
    with paddle.no_grad():
        x.add_(tensor([1.0, 1.0], dtype))
        x.scale_(0.5)
        x.zero_()
        x.fill_(3.0)
    assert as_float32(x.numpy()).tolist() == [3.0, 3.0] and not x.stop_gradient


@IS_DTYPE
def test_writing_a_wider_dtype_widens_the_tensor_itself(dtype):
    """Paddle does the same with float32 and float64."""
    x, wide = tensor([1.0], dtype), paddle.to_tensor([0.3])
    expected = (x.astype("float32") + wide).numpy()
    assert x.add_(wide) is x and dtype_of(x) == "float32"
    np.testing.assert_array_equal(x.numpy(), expected)
    single = paddle.to_tensor([0.3])
    assert dtype_of(single.add_(tensor([1.0], dtype))) == "float32"


@IS_DTYPE
def test_a_view_is_written_through(dtype):
    x = tensor(cases.X, dtype)
    before = as_float32(x.numpy())
    view = x[:, 1:3]
    view.add_(paddle.ones([4, 2], dtype))
    before[:, 1:3] = rounded(before[:, 1:3] + 1, dtype)
    np.testing.assert_array_equal(as_float32(view.numpy()), before[:, 1:3])
    np.testing.assert_array_equal(as_float32(x.numpy()), before)


@IS_DTYPE
def test_random_numbers_are_drawn_into_a_tensor(dtype):
    for draw in (lambda x: x.uniform_(0.0, 1.0), lambda x: x.normal_(), lambda x: x.exponential_()):
        x = paddle.zeros([1000], dtype)
        draw(x)
        assert dtype_of(x) == dtype
        assert len(np.unique(as_float32(x.numpy()))) > 50


SETTINGS = {
    "number": (slice(1, 3), lambda dtype: 0.3),
    "row": (0, lambda dtype: tensor(cases.ROW, dtype)),
    "columns": ((slice(None), slice(0, 2)), lambda dtype: tensor(cases.X[:, :2], dtype)),
    "float32": (0, lambda dtype: tensor(cases.ROW, "float32")),
    "rows": ([0, 2], lambda dtype: tensor(cases.X[1:3], dtype)),
    "index": (paddle.to_tensor([0, 2]), lambda dtype: tensor(cases.X[1:3], dtype)),
    "mask": (paddle.to_tensor(cases.MASK), lambda dtype: 0.5),
}


@IS_DTYPE
@pytest.mark.parametrize("name", SETTINGS)
def test_elements_are_set(name, dtype):
    index, make_value = SETTINGS[name]
    value = make_value(dtype)
    x = tensor(cases.X, dtype)
    expected = as_float32(x.numpy())
    array_index = index.numpy() if isinstance(index, paddle.Tensor) else index
    plain = value.numpy() if isinstance(value, paddle.Tensor) else np.float32(value)
    expected[array_index] = rounded(as_float32(plain), dtype)
    x[index] = value
    assert dtype_of(x) == dtype
    np.testing.assert_array_equal(as_float32(x.numpy()), expected)


def test_half_precision_is_set_into_float32():
    x = paddle.zeros([2])
    x[0] = tensor(1.5, "bfloat16")
    assert x.tolist() == [1.5, 0.0]


@IS_DTYPE
def test_gradients_pass_elements_that_were_set(dtype):
    x, value = tensor(np.ones(4), dtype, trained=True), tensor(np.ones(2), dtype, trained=True)
    work = x * 2.0
    work[paddle.to_tensor([1, 3])] = value * 3.0
    (work * tensor([1.0, 2.0, 3.0, 4.0], dtype)).sum().backward()
    assert as_float32(x.grad.numpy()).tolist() == [2.0, 0.0, 6.0, 0.0]
    assert as_float32(value.grad.numpy()).tolist() == [6.0, 12.0]


@IS_DTYPE
def test_gradients_of_a_repeated_index_are_added_in_float32(dtype):
    large = 256.0 if dtype == "bfloat16" else 2048.0
    x = tensor(np.zeros(2), dtype, trained=True)
    x[paddle.to_tensor([1] * 9)].backward(tensor([large] + [0.5] * 8, dtype))
    assert as_float32(x.grad.numpy()).tolist() == [0.0, large + 4]


@IS_DTYPE
def test_values_leave_as_python_and_numpy(dtype):
    x = tensor([1.5], dtype)
    assert float(x) == 1.5
    assert x.numpy().dtype == (np.uint16 if dtype == "bfloat16" else np.float16)
    assert dtype in str(x) and "1.5" in str(x)
