import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches.collate import block_mask, collate, collate_packed, collate_prompts, start_end_rows
from finetune.data.packing.packing import Bin
from finetune.data.samples.tokenize import IGNORE_INDEX, Prompt, Sample

ROWS = st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=12), min_size=1, max_size=6)


def make_sample(ids):
    ids = np.array(ids, dtype=np.int32)
    labels = np.where(np.arange(len(ids)) % 3 == 0, IGNORE_INDEX, ids + 1).astype(np.int32)
    return Sample(ids, labels, int((labels != IGNORE_INDEX).sum()), False, False)


def make_bin(*segments, first_index=0):
    samples = [make_sample(ids) for ids in segments]
    return Bin(
        np.concatenate([sample.input_ids for sample in samples]),
        np.concatenate([sample.labels for sample in samples]),
        np.array([len(sample.input_ids) for sample in samples], dtype=np.int32),
        np.arange(first_index, first_index + len(samples)),
    )


def make_prompt(ids):
    return Prompt(np.array(ids, dtype=np.int32), "", "")


def test_right_padding():
    batch = collate([make_sample([5, 6]), make_sample([7, 8, 9])], pad_token_id=1)
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[5, 6, 1], [7, 8, 9]],
        "labels": [[-100, 7, -100], [-100, 9, 10]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "position_ids": [[0, 1, 0], [0, 1, 2]],
        "lengths": [2, 3],
    }


def test_left_padding():
    batch = collate_prompts([make_prompt([5, 6]), make_prompt([7, 8, 9])], pad_token_id=1)
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[1, 5, 6], [7, 8, 9]],
        "attention_mask": [[0, 1, 1], [1, 1, 1]],
        "position_ids": [[0, 0, 1], [0, 1, 2]],
    }


@pytest.mark.parametrize(("multiple", "length"), [(None, 3), (1, 3), (2, 4), (3, 3), (8, 8)])
def test_pad_to_multiple_of(multiple, length):
    batch = collate(
        [make_sample([5, 6]), make_sample([7, 8, 9])], pad_token_id=0, pad_to_multiple_of=multiple
    )
    assert {array.shape for name, array in batch.items() if name != "lengths"} == {(2, length)}


@given(rows=ROWS, multiple=st.sampled_from([None, 4]))
def test_rows_come_back(rows, multiple):
    samples = [make_sample(row) for row in rows]
    batch = collate(samples, pad_token_id=3, pad_to_multiple_of=multiple)
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    assert batch["lengths"].tolist() == list(map(len, rows))
    for index, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        real, padding = slice(len(row)), slice(len(row), None)
        assert batch["input_ids"][index, real].tolist() == row
        assert batch["labels"][index, real].tolist() == sample.labels.tolist()
        assert batch["position_ids"][index, real].tolist() == list(range(len(row)))
        assert batch["attention_mask"][index].sum() == len(row)
        assert (batch["input_ids"][index, padding] == 3).all()
        assert (batch["labels"][index, padding] == IGNORE_INDEX).all()


@given(rows=ROWS)
def test_prompts_come_back(rows):
    batch = collate_prompts([make_prompt(row) for row in rows], pad_token_id=3)
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    for index, row in enumerate(rows):
        assert batch["input_ids"][index, -len(row) :].tolist() == row
        assert batch["position_ids"][index, -len(row) :].tolist() == list(range(len(row)))
        assert (batch["input_ids"][index, : -len(row)] == 3).all()
        assert batch["attention_mask"][index].tolist() == [0] * (max(map(len, rows)) - len(row)) + [1] * len(
            row
        )


def test_nothing_to_collate():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], pad_token_id=0)


def test_packed_rows():
    batch = collate_packed(
        [make_bin([5, 6], [7, 8, 9]), make_bin([4], first_index=2)],
        pad_token_id=1,
        pad_to_multiple_of=3,
        mask=None,
    )
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 1], [4, 1, 1, 1, 1, 1]],
        "labels": [[-100, 7, -100, 9, 10, -100], [-100] * 6],
        "position_ids": [[0, 1, 0, 1, 2, 0], [0] * 6],
        "lengths": [5, 1],
        "segment_lengths": [[2, 3], [1, 0]],
        "sample_indices": [[0, 1], [2, -1]],
    }
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


def test_mask_of_a_packed_row():
    batch = collate_packed([make_bin([5, 6, 7], [8, 9])], pad_token_id=1, row_length=6)
    assert batch["attention_mask"].astype(int).tolist() == [
        [
            [
                [1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 1, 1, 0, 0, 0],
                [0, 0, 0, 1, 0, 0],
                [0, 0, 0, 1, 1, 0],
                [0, 0, 0, 0, 0, 1],
            ]
        ]
    ]
    batch = collate_packed([make_bin([5, 6, 7], [8, 9])], pad_token_id=1, row_length=6, mask="start_end")
    assert batch["attn_mask_startend_row_indices"].tolist() == [[[3, 3, 3, 5, 5, 6]]]
    assert "attention_mask" not in batch


def plain_mask(rows, row_length):
    """Who sees whom, asked pair by pair."""
    mask = np.zeros((len(rows), 1, row_length, row_length), dtype=bool)
    for number, lengths in enumerate(rows):
        segment_of = [index for index, length in enumerate(lengths) for _ in range(length)]
        segment_of += range(len(lengths), len(lengths) + row_length - len(segment_of))  # each for itself
        for query in range(row_length):
            for key in range(query + 1):
                mask[number, 0, query, key] = segment_of[query] == segment_of[key]
    return mask


SEGMENTS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3)


@given(rows=SEGMENTS, padding=st.integers(0, 4))
def test_masks_equal_a_plain_double_loop(rows, padding):
    row_length = max(map(sum, rows)) + padding
    lengths = [np.array(row, dtype=np.int32) for row in rows]
    expected = plain_mask(rows, row_length)
    mask = block_mask(lengths, row_length)
    assert mask.dtype == bool
    assert mask.tolist() == expected.tolist()
    first_hidden = start_end_rows(lengths, row_length)
    assert (first_hidden.dtype, first_hidden.shape) == (np.int32, (len(rows), 1, row_length))
    query, key = np.arange(row_length)[:, None], np.arange(row_length)
    seen = (key <= query) & (query < first_hidden[:, :, None, :])
    assert seen.tolist() == expected.tolist()


def test_long_segments_are_filled_tile_by_tile():
    lengths = np.array([255, 256, 257, 600, 1])
    mask = block_mask([lengths], 1400)[0, 0]
    start = 0
    for length in lengths:
        square = mask[start : start + length, start : start + length]
        assert (square == np.tri(length, dtype=bool)).all()
        start += length
    assert mask.sum() == (lengths * (lengths + 1) // 2).sum() + 1400 - start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_length": 2}, "a bin has 3 tokens, expected at most the row length of 2"),
        ({"mask": "dense"}, "mask is 'dense', expected"),
    ],
)
def test_packed_rows_refused(options, message):
    with pytest.raises(ValueError, match=message):
        collate_packed([make_bin([5, 6, 7])], pad_token_id=0, **options)
