from bisect import bisect_left, insort
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.batches.collate import collate, collate_packed
from finetune.data.packing.best_fit import assign_bins
from finetune.data.packing.packing import Bin, PackedSamples, pack, split_open
from finetune.data.samples.tokenize import IGNORE_INDEX, Sample


@st.composite
def lengths_and_capacity(draw):
    capacity = draw(st.integers(1, 60))
    return np.array(draw(st.lists(st.integers(1, capacity), max_size=120)), dtype=np.int64), capacity


def log_normal(num_samples, seed=0):
    """Lengths as instruction data has them: median 180, 95% below about 900, at most 2048; mean about 270."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(180), 0.98, 2 * num_samples)).round()
    return lengths[(lengths >= 1) & (lengths <= 2048)][:num_samples].astype(np.int64)


def fills_one_by_one(lengths, capacity):
    """Best-fit-decreasing as the textbook has it: tokens of each bin, ascending."""
    rooms, closed = [], 0
    for length in sorted(lengths, reverse=True):
        place = bisect_left(rooms, length)
        room = (rooms.pop(place) if place < len(rooms) else capacity) - length
        if room:
            insort(rooms, room)
        else:
            closed += 1
    return sorted([capacity - room for room in rooms] + [capacity] * closed)


def make_sample(ids):
    ids = np.array(ids, dtype=np.int32)
    labels = np.where(np.arange(len(ids)) % 3 == 0, IGNORE_INDEX, np.roll(ids, -1)).astype(np.int32)
    return Sample(ids, labels, int((labels != IGNORE_INDEX).sum()), False, False)


# ---------------------------------------------------------------- the packing


@given(case=lengths_and_capacity(), seed=st.integers(0, 99), window=st.none() | st.integers(1, 40))
def test_no_sample_is_lost_or_doubled_and_no_bin_overflows(case, seed, window):
    lengths, capacity = case
    packing = pack(lengths, capacity, seed=seed, window=window)
    assert sorted(packing.order) == list(range(len(lengths)))
    fills = [lengths[packing[number]].sum() for number in range(len(packing))]
    assert fills == packing.num_bin_tokens.tolist()
    assert all(0 < fill <= capacity for fill in fills)
    assert packing.num_tokens == lengths.sum()
    if len(packing):
        assert packing.efficiency == pytest.approx(lengths.sum() / (len(packing) * capacity))
    again = pack(lengths, capacity, seed=seed, window=window)
    assert (again.order == packing.order).all() and (again.offsets == packing.offsets).all()


@given(case=lengths_and_capacity())
def test_bins_are_filled_as_by_placing_samples_one_by_one(case):
    lengths, capacity = case
    packing = pack(lengths, capacity, seed=0)
    assert sorted(packing.num_bin_tokens.tolist()) == fills_one_by_one(lengths, capacity)


@pytest.mark.parametrize("capacity", [2048, 4096])
def test_many_samples_are_filled_as_by_placing_them_one_by_one(capacity):
    lengths = log_normal(20_000)
    packing = pack(lengths, capacity, seed=0)
    assert sorted(packing.num_bin_tokens.tolist()) == fills_one_by_one(lengths.tolist(), capacity)


def test_runs_of_equal_bins():
    # 40 bins with room 700 (a sample of 300 each), then 61 more samples of 300: two of them fit each.
    counts = np.zeros(1001, dtype=np.int64)
    counts[300], counts[700] = 61, 40
    fills = Counter(np.bincount(assign_bins(counts, 1000), np.repeat([700, 300], [40, 61])).tolist())
    assert fills == {1000: 40, 900: 7}


@pytest.mark.parametrize("capacity", [2048, 4096])
@pytest.mark.parametrize("window", [None, 10_000])
def test_next_to_nothing_stays_empty(capacity, window):
    lengths = log_normal(50_000)
    assert 13.2e6 < lengths.sum() < 13.8e6 and 170 < np.median(lengths) < 185
    assert pack(lengths, capacity, seed=3, window=window).efficiency > 0.9995


@pytest.mark.parametrize("window", [None, 1000])
def test_neither_company_nor_order_follows_the_file(window):
    packing = pack(np.full(8000, 100), 400, seed=5, window=window)
    assert set(np.diff(packing.offsets)) == {4}
    rows = np.sort(packing.order.reshape(-1, 4), axis=1)
    assert (np.diff(rows, axis=1) == 1).sum() < 25  # 3 in random company
    assert abs(np.corrcoef(np.arange(len(rows)), rows.mean(axis=1))[0, 1]) < 0.1


def test_order_of_bins_follows_no_length():
    packing = pack(log_normal(20_000), 2048, seed=5)
    counts = np.diff(packing.offsets)
    assert abs(np.corrcoef(np.arange(len(counts)), counts)[0, 1]) < 0.1


def test_seed_changes_company():
    lengths = log_normal(1000)
    first, second = (pack(lengths, 2048, seed=seed) for seed in (0, 1))
    assert len(first) == len(second)
    assert (first.order != second.order).mean() > 0.9


def test_lengths_without_a_partner_pass_through_windows():
    packing = pack(np.full(1003, 6), 10, seed=0, window=10)
    assert len(packing) == 1003
    assert sorted(packing.order) == list(range(1003))


def test_split_open():
    packing = pack(np.array([10, 10, 4, 10, 5, 10, 10, 10, 10]), 10, seed=0)
    closed, waiting = split_open(packing)
    assert closed.num_bin_tokens.tolist() == [10] * 7
    assert sorted(waiting) == [2, 4]
    assert sorted([*closed.order, *waiting]) == list(range(9))


def test_split_open_keeps_three_quarters():
    packing = pack(np.full(8, 6), 10, seed=0)
    closed, waiting = split_open(packing)
    assert (len(closed), len(waiting)) == (6, 2)


def test_nothing_to_pack():
    packing = pack(np.array([], dtype=np.int64), 8, seed=0)
    assert (len(packing), packing.num_tokens, packing.efficiency) == (0, 0, 1.0)


@pytest.mark.parametrize(
    ("lengths", "capacity", "window", "message"),
    [
        ([3, 9, 2, 12], 8, None, r"sample 1 has 9 tokens where a bin takes 1 to 8 \(so do 2 in all\)"),
        ([3, 0], 8, None, "sample 1 has 0 tokens"),
        ([3], 0, None, "capacity is 0"),
        ([3], 8, 0, "window is 0"),
        ([3.0], 8, None, "float64 .* expected integers"),
        ([[3]], 8, None, r"shape \(1, 1\), expected integers \[samples\]"),
    ],
)
def test_refused(lengths, capacity, window, message):
    with pytest.raises(ValueError, match=message):
        pack(np.array(lengths), capacity, seed=0, window=window)


# ---------------------------------------------------------------- the bins


def test_bins_join_whole_samples():
    samples = [make_sample(range(10 * n, 10 * n + n)) for n in range(1, 9)]
    rows = PackedSamples(samples, pack(np.array([len(s.input_ids) for s in samples]), 10, seed=2))
    seen = []
    for number, row in enumerate(rows):
        start = 0
        for index, length in zip(row.sample_indices.tolist(), row.segment_lengths.tolist(), strict=True):
            stop = start + length
            assert row.input_ids[start:stop].tolist() == samples[index].input_ids.tolist()
            assert row.labels[start:stop].tolist() == samples[index].labels.tolist()
            seen.append(index)
            start = stop
        assert start == len(row.input_ids) == rows.lengths[number]
        assert rows.num_label_tokens[number] == (row.labels != IGNORE_INDEX).sum()
        assert {array.dtype for array in (row.input_ids, row.labels, row.segment_lengths)} == {
            np.dtype(np.int32)
        }
    assert sorted(seen) == list(range(8))
    assert [row.input_ids.tolist() for row in rows[1:3]] == [rows[n].input_ids.tolist() for n in (1, 2)]
    assert rows[-1].input_ids.tolist() == rows[len(rows) - 1].input_ids.tolist()
    with pytest.raises(IndexError):
        rows[len(rows)]


# ---------------------------------------------------------------- packed = unpacked, in a model


@pytest.fixture(scope="module")
def llama(tiny_llama):
    from paddlenlp.transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(str(tiny_llama), dtype="float32")
    model.eval()
    return model


@pytest.fixture(scope="module")
def segments():
    rng = np.random.default_rng(0)
    return [make_sample(rng.integers(5, 590, length)) for length in (7, 2, 12, 5, 17, 23, 9)]


def packed_rows(samples, capacity=32):
    lengths = np.array([len(sample.input_ids) for sample in samples])
    return list(PackedSamples(samples, pack(lengths, capacity, seed=1)))


def join(*samples):
    """One bin with these samples, in this order."""
    return Bin(
        np.concatenate([sample.input_ids for sample in samples]),
        np.concatenate([sample.labels for sample in samples]),
        np.array([len(sample.input_ids) for sample in samples], dtype=np.int32),
        np.arange(len(samples)),
    )


def run(model, batch, names=("input_ids", "position_ids", "attention_mask")):
    import paddle

    logits = model(**{name: paddle.to_tensor(batch[name]) for name in names})
    return logits[0] if isinstance(logits, tuple) else logits


def logits_alone(model, sample):
    return run(model, collate([sample], pad_token_id=0), ["input_ids"]).numpy()[0]


def gradients(model, batch, names):
    import paddle

    from finetune.training.loss import token_loss_sum

    loss = token_loss_sum(run(model, batch, names), paddle.to_tensor(batch["labels"]))
    loss.backward()
    found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    model.clear_gradients()
    return float(loss), found


def test_logits_of_segments_equal_those_of_samples_alone(llama, segments):
    rows = packed_rows(segments)
    assert max(len(row.segment_lengths) for row in rows) >= 3
    batch = collate_packed(rows, pad_token_id=0, pad_to_multiple_of=5)
    packed = run(llama, batch).numpy()
    assert np.isfinite(packed).all()
    leaking = run(llama, batch, ["input_ids", "position_ids"]).numpy()
    leaks = []
    for number, row in enumerate(rows):
        stops = np.cumsum(row.segment_lengths)
        for index, stop in zip(row.sample_indices, stops, strict=True):
            alone = logits_alone(llama, segments[index])
            place = (number, slice(stop - len(alone), stop))
            np.testing.assert_allclose(packed[place], alone, rtol=0, atol=1e-5)
            leaks.append(np.abs(leaking[place] - alone).max())
    assert max(leaks) > 1e-3  # it is the mask that keeps them apart


def test_gradients_of_packed_rows_equal_those_of_samples(llama, segments):
    rows = packed_rows(segments)
    packed_loss, packed = gradients(
        llama, collate_packed(rows, pad_token_id=0), ["input_ids", "position_ids", "attention_mask"]
    )
    plain_loss, plain = gradients(llama, collate(segments, pad_token_id=0), ["input_ids"])
    assert packed_loss == pytest.approx(plain_loss, rel=1e-6)
    for name, expected in plain.items():
        np.testing.assert_allclose(packed[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_changing_one_segment_changes_no_other(llama, segments):
    first, middle, last = segments[0], segments[2], segments[3]
    other = make_sample(middle.input_ids[::-1].copy())
    before, after = (
        run(llama, collate_packed([join(first, sample, last)], pad_token_id=0, row_length=30)).numpy()[0]
        for sample in (middle, other)
    )
    changed = np.abs(before - after).max(axis=-1)  # [length]
    own = slice(len(first.input_ids), len(first.input_ids) + len(middle.input_ids))
    assert changed[own].min() > 1e-4
    assert np.delete(changed, own).max() < 1e-6


def test_a_bin_of_one_sample_equals_the_sample(llama, segments):
    sample = segments[5]
    batch = collate_packed([join(sample)], pad_token_id=0)
    plain = collate([sample], pad_token_id=0)
    for name in ("input_ids", "labels", "position_ids", "lengths"):
        assert batch[name].tolist() == plain[name].tolist()
    np.testing.assert_array_equal(run(llama, batch).numpy()[0], logits_alone(llama, sample))
