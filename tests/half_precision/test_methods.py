"""Operators of Python, in-place ones, and indexing."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from tests.half_precision.conftest import DTYPES, draw, rounded, tensor, values

pytestmark = [pytest.mark.usefixtures("half"), pytest.mark.parametrize("dtype", DTYPES)]


def test_arithmetic_of_python(dtype):
    a, b = draw(3, 4), np.abs(draw(3, 4, seed=1)) + 1
    x, y = tensor(a, dtype), tensor(b, dtype)
    a, b = rounded(a, dtype), rounded(b, dtype)
    for result, expected in (
        (x + y, a + b), (x - y, a - b), (x * y, a * b), (x / y, a / b), (2.0 - x, 2 - a), (1.0 / y, 1 / b),
        (-x, -a), (abs(x), np.abs(a)), (y**2, b**2), (x @ y.t(), a @ b.T),
    ):  # fmt: skip
        assert str(result.dtype).endswith(dtype)
        np.testing.assert_allclose(values(result), rounded(expected, dtype), rtol=2.0**-7, atol=1e-3)
    for result, expected in ((x > y, a > b), (x <= y, a <= b), (x == x, a == a), (x != y, a != b)):
        np.testing.assert_array_equal(result.numpy(), expected)


def test_in_place_operators_round_into_the_tensor(dtype):
    a = draw(5)
    x = tensor(a, dtype, trained=False)
    place = x.data_ptr()
    x.scale_(0.5)
    x.multiply_(tensor(np.full(5, 3.0), dtype, trained=False))
    x.subtract_(tensor(np.full(5, 0.3), dtype, trained=False))
    x.clip_(min=-1.0)
    x.add_(tensor(np.ones(5), dtype, trained=False))
    expected = rounded(a, dtype)
    third = rounded(np.full(5, 0.3), dtype)
    steps = (lambda v: v * 0.5, lambda v: v * 3, lambda v: v - third, lambda v: v.clip(-1), lambda v: v + 1)
    for step in steps:
        expected = rounded(step(expected), dtype)
    np.testing.assert_array_equal(values(x), expected)
    assert x.data_ptr() == place and str(x.dtype).endswith(dtype)


def test_in_place_operators_inside_a_graph(dtype):
    x = tensor(draw(4), dtype)
    y = x * 2.0
    y.add_(tensor(np.ones(4), dtype, trained=False))
    y.backward(paddle.ones([4], dtype))
    assert values(x.grad).tolist() == [2.0] * 4


def test_indexing_by_slices_numbers_tensors_and_masks(dtype):
    a = draw(5, 3)
    x, exact = tensor(a, dtype), rounded(a, dtype)
    rows, mask = paddle.to_tensor([4, 0, 4]), paddle.to_tensor([True, False, True, False, False])
    for index, where in ((1, 1), (slice(1, 3), slice(1, 3)), (rows, [4, 0, 4]), (mask, mask.numpy())):
        np.testing.assert_array_equal(values(x[index]), exact[where])
    x[rows].backward(paddle.ones([3, 3], dtype))
    assert values(x.grad)[:, 0].tolist() == [1, 0, 0, 0, 2]


def test_setting_by_slices_and_tensors(dtype):
    x = tensor(np.zeros((4, 2)), dtype, trained=False)
    x[1:3] = 1.0
    x[paddle.to_tensor([0, 3])] = tensor(np.full((2, 2), 2.5), dtype, trained=False)
    x[2, 1] = paddle.to_tensor(0.1)
    expected = [[2.5, 2.5], [1, 1], [1, float(rounded(np.float32(0.1).reshape(1), dtype)[0])], [2.5, 2.5]]
    np.testing.assert_array_equal(values(x), np.array(expected, np.float32))
