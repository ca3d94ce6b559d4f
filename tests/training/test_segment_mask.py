"""The block mask of packed rows, made from segment lengths on a device, against the one that NumPy fills."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.batches import segment_mask
from finetune.data.batches.collate import block_mask
from finetune.data.batches.segment_mask import compare_segments, make_block_mask

rows_of_lengths = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=4)


def as_array(rows):
    lengths = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for number, row in enumerate(rows):
        lengths[number, : len(row)] = row
    return lengths


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_lengths, num_padding=st.integers(0, 4))
def test_the_mask_of_any_layout_is_that_of_numpy(rows, num_padding):
    lengths = as_array(rows)
    row_length = max(1, int(lengths.sum(axis=1).max()) + num_padding)
    expected = block_mask(list(lengths), row_length)
    found = compare_segments(lengths, row_length)
    assert found.dtype == paddle.bool and found.shape == [len(rows), 1, row_length, row_length]
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(make_block_mask(lengths, row_length).numpy(), expected)


@pytest.mark.parametrize(("device", "compares"), [("cpu", False), ("gpu:0", True)])
def test_only_a_cpu_fills_the_mask_on_the_host(monkeypatch, device, compares):
    called = []
    monkeypatch.setattr(paddle, "get_device", lambda: device)
    monkeypatch.setattr(segment_mask, "compare_segments", lambda *_: called.append("compared"))
    make_block_mask(np.array([[2, 1]], np.int32), 4)
    assert called == (["compared"] if compares else [])
