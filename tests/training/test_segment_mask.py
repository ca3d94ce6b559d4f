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


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_lengths, num_padding=st.integers(0, 4), random=st.randoms(use_true_random=False))
def test_branches_see_their_trunk(rows, num_padding, random):
    lengths = as_array(rows)
    trunks = np.tile(np.arange(lengths.shape[1], dtype=np.int32), (len(rows), 1))
    for row in trunks:  # each segment begins anew or goes on from the last that does
        for place in range(1, len(row)):
            if random.random() < 0.6:
                row[place] = row[place - 1]
    row_length = max(1, int(lengths.sum(axis=1).max()) + num_padding)
    dense = block_mask(list(lengths), row_length, trunks)
    np.testing.assert_array_equal(compare_segments(lengths, row_length, trunks).numpy(), dense)
    for number in range(len(rows)):
        segment_of = np.repeat(np.arange(lengths.shape[1]), lengths[number])
        for query, of_query in enumerate(segment_of):
            seen = {int(key) for key in np.flatnonzero(dense[number, 0, query])}
            shown = {int(of_query), int(trunks[number, of_query])}
            assert seen == {key for key in range(query + 1) if int(segment_of[key]) in shown}


@pytest.mark.parametrize(("device", "compares"), [("cpu", False), ("gpu:0", True)])
def test_only_a_cpu_fills_the_mask_on_the_host(monkeypatch, device, compares):
    called = []
    monkeypatch.setattr(paddle, "get_device", lambda: device)
    monkeypatch.setattr(segment_mask, "compare_segments", lambda *_: called.append("compared"))
    make_block_mask(np.array([[2, 1]], np.int32), 4)
    assert called == (["compared"] if compares else [])
