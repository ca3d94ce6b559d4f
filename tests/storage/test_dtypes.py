"""The table of element types, and bfloat16 to and from float32."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from finetune.errors import UserError
from finetune.storage import dtypes
from finetune.storage.dtypes import add_bfloat16, array_dtype, as_float32, dtype_name, num_bytes, rounded

ALL_BITS = np.arange(2**16, dtype=np.uint32).astype(np.uint16)


@pytest.mark.parametrize("name", dtypes.NAMES)
def test_names_of_paddle_numpy_and_files_agree(name):
    tensor = paddle.ones([3], "float32").astype(name)
    assert dtype_name(tensor.dtype) == dtype_name(tensor.numpy().dtype) == name
    assert array_dtype(tensor.dtype) == array_dtype(name) == tensor.numpy().dtype
    assert num_bytes(name, [2, 3]) == 6 * tensor.element_size()
    code = dtypes.safetensors_code(array_dtype(name))
    assert dtypes.SAFETENSORS_CODES[code] == tensor.numpy().dtype
    assert np.dtype(list(dtypes.TORCH_STORAGES.values())[dtypes.NAMES.index(name)]) == tensor.numpy().dtype
    again = dtypes.to_tensor(tensor.numpy())
    assert again.dtype == tensor.dtype and again.numpy().tobytes() == tensor.numpy().tobytes()


def test_a_type_without_a_name_is_refused():
    with pytest.raises(
        UserError, match="element type complex64 is not written: convert the tensors to one of float64"
    ):
        dtypes.safetensors_code(np.dtype(np.complex64))


def test_every_bfloat16_survives_float32():
    values = as_float32(ALL_BITS)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(rounded(values, dtypes.BFLOAT16)[numbers], ALL_BITS[numbers])
    assert np.isnan(as_float32(rounded(values, dtypes.BFLOAT16))[~numbers]).all()


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF80FFFF])
def test_not_a_number_stays_so(bits):
    """Plain rounding of these bits gives infinity or zero."""
    values = np.array([bits, 0x3F800000], np.uint32).view(np.float32)
    np.testing.assert_array_equal(as_float32(rounded(values, dtypes.BFLOAT16)), [np.nan, 1.0])


def test_rounding_is_to_the_nearest_and_ties_to_even():
    low = np.arange(0x3F80, 0x3FC0, dtype=np.uint32)  # consecutive bfloat16 from 1.0
    for tail, up in ((0x7FFF, 0), (0x8000, low & 1), (0x8001, 1)):
        values = (low << 16 | tail).view(np.float32)
        np.testing.assert_array_equal(rounded(values, dtypes.BFLOAT16), low + up)
        np.testing.assert_array_equal(rounded(values[0], dtypes.BFLOAT16), (low + up)[0])
    before = values.copy()
    rounded(values, dtypes.BFLOAT16)
    np.testing.assert_array_equal(values, before)


def test_sums_are_rounded_once():
    generator = np.random.default_rng(0)
    weight = generator.integers(0x3F00, 0x4100, (5, 7)).astype(np.uint16)
    update = generator.standard_normal((5, 7), dtype=np.float32)
    expected = rounded(as_float32(weight) + update, dtypes.BFLOAT16)
    np.testing.assert_array_equal(add_bfloat16(update, weight, np.empty((5, 7), np.uint32)), expected)
