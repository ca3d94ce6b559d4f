"""Reductions over ranks against NumPy, in half precision too."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.parallel.cpu_reductions import find_function, reduce_arrays
from tests.half_precision.rounding import DTYPES, as_float32, rounded


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values that the dtype can hold, in the form that a tensor's `numpy()` has."""
    if dtype == "float16":
        return values.astype(np.float16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [np.add, np.multiply, np.maximum, np.minimum])
def test_half_precision_is_rounded_once(dtype, function, shape):
    source = np.random.default_rng(1)
    rows = [rounded(source.normal(size=shape), dtype) for _ in range(5)]
    expected = rows[0]
    for row in rows[1:]:
        expected = function(expected, row)
    result = reduce_arrays((stored(np.asarray(row), dtype) for row in rows), function)
    assert result.shape == shape and result.dtype == stored(np.zeros(1, np.float32), dtype).dtype
    np.testing.assert_array_equal(as_float32(result), rounded(expected, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_addends_are_not_lost_one_by_one(dtype):
    """256 + 0.5 + ... (or 2048 + 0.5 + ...): each addend alone is less than half of the last place."""
    large = 256.0 if dtype == "bfloat16" else 2048.0
    rows = [stored(np.float32([value]), dtype) for value in [large] + [0.5] * 8]
    assert as_float32(reduce_arrays(rows, np.add)) == large + 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_and_no_number_stay_what_they_are(dtype):
    rows = [stored(np.float32(row), dtype) for row in ([np.inf, np.inf, np.nan, 1], [1, -np.inf, 1, np.nan])]
    result = as_float32(reduce_arrays(rows, np.add))
    assert np.isinf(result[0]) and np.isnan(result[1:]).all()


def test_float16_overflows_to_infinity_without_a_warning(recwarn):
    rows = [np.float16([60000])] * 2
    assert np.isinf(reduce_arrays(rows, np.add)) and not recwarn.list


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int8", "bool"])
def test_other_types_are_reduced_as_they_are(dtype):
    rows = [np.arange(4).astype(dtype), np.ones(4, dtype)]
    result = reduce_arrays(rows, np.add)
    assert result.dtype == rows[0].dtype
    np.testing.assert_array_equal(result, rows[0] + rows[1])


def test_functions_of_paddles_reductions():
    from paddle.base import core

    assert find_function(None) is find_function(core.ReduceOp.SUM) is np.add
    assert find_function(core.ReduceOp.MAX) is np.maximum
