"""Rows of answers: what stands where, and what a batch says of its answers and groups."""

import numpy as np
import pytest

from finetune.data.batches.preference_rows import PreferenceRows, group_lengths
from finetune.data.packing.packing import pack
from finetune.data.preference.sample import PreferenceSample, find_partners
from finetune.data.samples.tokenize import IGNORE_INDEX


def ids(*values):
    return np.array(values, np.int32)


PAIRS = [
    PreferenceSample(ids(11, 12, 13), (ids(21, 22), ids(31, 32, 33)), margin=0.5),
    PreferenceSample(ids(14), (ids(24), ids(34, 35))),
    PreferenceSample(ids(15, 16), (ids(25, 26, 27), ids(36))),
]
MARKED = [
    PreferenceSample(ids(11, 12), (ids(21, 22),), True),
    PreferenceSample(ids(13), (ids(23, 24, 25),), False),
]


def rows_of(samples, **options):
    return PreferenceRows(samples, pad_token_id=0, **options)


def labels_by_answer(batch):
    labels = batch.labels[batch.labels != IGNORE_INDEX]
    return [labels[batch.answer_of_label == number].tolist() for number in range(batch.num_answers)]


def test_a_group_in_one_row():
    batch = rows_of(PAIRS).batch(np.array([0, 1]))
    assert batch.inputs["input_ids"].tolist() == [[11, 12, 13, 21, 13, 31, 32], [14, 14, 34, 0, 0, 0, 0]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 0, 1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 21, 22, 31, 32, 33], [24, 34, 35, -100, -100, -100, -100]]
    assert batch.answer_of_label.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert (
        batch.mask_segments.tolist() == [[2, 2, 3], [0, 1, 2]]
        and batch.mask_trunks.tolist() == [[0, 0, 0]] * 2
    )
    assert batch.groups == ((0, 1), (2, 3)) and batch.num_answers == 4 and batch.num_groups == 2
    assert batch.answer_lengths.tolist() == [2, 3, 1, 2] and batch.sample_indices.tolist() == [0, 1]
    assert batch.margins.tolist() == [0.5, 0.0] and batch.desirable is None
    assert batch.segments == [[(7, 0)], [(3, 1)]]
    assert batch.num_tokens == 10 and batch.num_label_tokens == 8
    idle = batch.idle()
    assert (idle.num_groups, idle.num_tokens, idle.num_label_tokens, idle.weight) == (0, 0, 0, 0.0)
    assert idle.groups == batch.groups


def test_answers_in_rows_of_their_own_need_no_mask():
    batch = rows_of(PAIRS, mask=None).batch(np.array([0, 2]))
    assert batch.inputs.keys() == {"input_ids"} and batch.mask_segments is None
    assert batch.inputs["input_ids"].tolist()[:2] == [[11, 12, 13, 21, 0], [11, 12, 13, 31, 32]]
    assert batch.groups == ((0, 1), (2, 3)) and batch.num_groups == 2
    assert batch.segments == [[(4, 0)], [(5, 0)], [(4, 2)], [(2, 2)]]


@pytest.mark.parametrize("mask", ["block", "start_end", None])
@pytest.mark.parametrize("learns_prompts", [False, True])
def test_every_form_has_the_same_labels(mask, learns_prompts):
    rows = rows_of(PAIRS, mask=mask, learns_prompts=learns_prompts, pad_to_multiple_of=8)
    indices = np.arange(3)
    batch = rows.batch(indices)
    assert batch.shape[1] % 8 == 0
    assert labels_by_answer(batch) == [answer.tolist() for sample in PAIRS for answer in sample.answers]
    assert rows.count_label_tokens(indices) == batch.num_label_tokens == len(batch.answer_of_label)
    assert rows.count_groups(indices) == 3
    prompts = batch.labels[batch.labels != IGNORE_INDEX][batch.answer_of_label == -1]
    assert prompts.tolist() == ([12, 13, 16] if learns_prompts else [])  # each once
    assert rows.lengths.tolist() == [7, 3, 5] if mask else [9, 3, 6]
    assert batch.num_tokens == rows.lengths.sum()


@pytest.mark.parametrize("mask", ["block", "start_end"])
def test_packed_groups(mask):
    packing = pack(group_lengths(PAIRS), 10, seed=3)
    rows = rows_of(PAIRS, packing=packing, mask=mask)
    assert len(rows) == len(packing) == 2 and rows.lengths.sum() == 15
    batch = rows.batch(np.arange(2))
    assert (
        sorted(batch.sample_indices.tolist()) == [0, 1, 2]
        and batch.num_groups == rows.count_groups(np.arange(2)) == 3
    )
    expected = [answer.tolist() for index in batch.sample_indices for answer in PAIRS[index].answers]
    assert labels_by_answer(batch) == expected
    assert ("attn_mask_startend_row_indices" in batch.inputs) == (mask == "start_end")
    assert (batch.mask_segments is None) == (mask == "start_end")
    again = rows_of(PAIRS, packing=pack(group_lengths(PAIRS), 10, seed=3), mask=mask).batch(np.arange(2))
    np.testing.assert_array_equal(again.inputs["input_ids"], batch.inputs["input_ids"])
    with pytest.raises(ValueError, match="need a mask"):
        rows_of(PAIRS, packing=packing, mask=None)


def test_marked_answers_and_their_partners():
    alone = rows_of(MARKED).batch(np.arange(2))
    assert alone.groups == ((0,), (1,)) and alone.desirable.tolist() == [True, False]
    assert (
        alone.mask_segments is None and "position_ids" not in alone.inputs
    )  # a row of one text needs no mask
    partners = find_partners(MARKED)
    rows = rows_of(MARKED, partners=partners)
    batch = rows.batch(np.arange(2))
    assert batch.groups == ((0, 1), (2, 3)) and batch.num_groups == 2
    assert labels_by_answer(batch) == [[21, 22], [23, 24, 25], [23, 24, 25], [21, 22]]
    assert rows.lengths.tolist() == group_lengths(MARKED, partners=partners).tolist() == [6, 5]
    assert rows.fingerprint() != rows_of(MARKED).fingerprint()


def test_the_fingerprint_follows_the_samples():
    assert rows_of(PAIRS).fingerprint() == rows_of(PAIRS, mask=None).fingerprint()
    assert rows_of(PAIRS).fingerprint() != rows_of(PAIRS[::-1]).fingerprint()
    swapped = [PreferenceSample(each.prompt_ids, each.answers[::-1], margin=each.margin) for each in PAIRS]
    assert rows_of(PAIRS).fingerprint() != rows_of(swapped).fingerprint()


def test_an_unknown_mask():
    with pytest.raises(ValueError, match="mask is 'dense'"):
        rows_of(PAIRS, mask="dense")
