import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.collate import collate, collate_prompts
from finetune.data.tokenize import IGNORE_INDEX, Prompt, Sample

ROWS = st.lists(st.lists(st.integers(5, 99), min_size=1, max_size=12), min_size=1, max_size=6)


def make_sample(ids):
    ids = np.array(ids, dtype=np.int32)
    labels = np.where(np.arange(len(ids)) % 3 == 0, IGNORE_INDEX, ids + 1).astype(np.int32)
    return Sample(ids, labels, int((labels != IGNORE_INDEX).sum()), False, False)


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
