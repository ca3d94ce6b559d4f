"""Batches out of memory and out of a stream, behind one face."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from finetune.data.batches.batch_source import MapSource, StreamSource, make_share
from finetune.data.batches.rows import PackedRows, PaddedRows
from finetune.data.batches.sampler import GlobalOrder
from finetune.data.packing.packing import PackedSamples, pack
from finetune.data.reading.mixing import DataSource
from finetune.data.samples.sample_store import SampleStore
from finetune.data.samples.tokenize import Sample
from finetune.data.stream.settings import StreamSettings
from finetune.data.stream.worker import StreamPlan, StreamProcess, shares_of
from finetune.errors import UserError
from finetune.run.stream import make_row_builder
from finetune.training.prefetch import PrefetchedSource
from tests.data.stream_builders import make_coarse_builder

PADDING: dict[str, Any] = {"pad_token_id": 0, "pad_to_multiple_of": None}


def make_samples(count: int) -> list[Sample]:
    arrays = [np.arange(number + 2, dtype=np.int32) for number in range(count)]
    return [Sample(array, array, len(array), False, False) for array in arrays]


def store_of(samples: list[Sample]) -> SampleStore:
    tokens = [np.append(sample.input_ids, 0).astype(np.int32) for sample in samples]
    learned = [np.append(False, sample.labels != -100) for sample in samples]
    return SampleStore(
        {
            "tokens": np.concatenate(tokens),
            "learned": np.concatenate(learned),
            "offsets": np.cumsum([0, *map(len, tokens)]),
            "cuts": np.zeros(len(samples), np.uint8),
            "dropped_rounds": np.zeros(len(samples), np.int32),
        }
    )


@pytest.fixture
def make_stream(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"src": "{n}", "tgt": "{"x" * 20 * n}y"}}\n' for n in range(30)))
    sources = []

    def make(*, size=4, accumulated=2, row_length=None, mask=None, rank=0, world=1):
        batch_size = size * accumulated * world
        share = make_share(batch_size, micro_batch_size=size, rank=rank, world=world)
        plan = StreamPlan(
            sources=(DataSource(name="set", files=(file,)),),
            make_builder=make_coarse_builder,
            settings=StreamSettings(seed=1, shuffle_buffer_size=8, row_length=row_length),
            global_batch_size=batch_size,
            shares=shares_of(share),
        )
        source = StreamSource(StreamProcess(plan), make_row_builder(PADDING, mask))
        sources.append(source)
        return source

    yield make
    for source in sources:
        source.close()


def test_a_set_in_memory_gives_the_order_epochs_and_position():
    rows = PaddedRows(make_samples(10), **PADDING)
    source = MapSource(rows, GlobalOrder(10, global_batch_size=4, seed=1), micro_batch_size=2)
    assert source.steps_per_epoch == 3
    _, indices = source.order.batch(1)
    got = [index for batch in source.batch(1).micro_batches for row in batch.segments for _, index in row]
    assert got == indices.tolist()
    assert [source.epoch(step) for step in (0, 1, 3)] == [0, 1 / 3, 1]
    assert [source.ends_epoch(step) for step in (1, 2, 3, 6)] == [False, False, True, True]


def test_a_checkpoint_of_a_set_in_memory_tells_changed_data(tmp_path):
    def make(samples):
        rows = PaddedRows(samples, **PADDING)
        return MapSource(rows, GlobalOrder(len(samples), global_batch_size=2, seed=1), micro_batch_size=2)

    position = make(make_samples(6)).save(tmp_path, 4)
    assert position["step"] == 4 and not list(tmp_path.iterdir())
    assert make(make_samples(6)).restore(tmp_path, position) is None
    assert "the training data changed" in str(make(make_samples(7)[1:]).restore(tmp_path, position))
    with pytest.raises(UserError, match="num_samples 6, this run has 7"):
        make(make_samples(7)).restore(tmp_path, position)


def test_streamed_rows_are_collated_as_rows_in_memory_are(make_stream):
    source = make_stream()
    first, second = source.batch(0).micro_batches
    assert first.inputs["input_ids"].shape[0] == second.inputs["input_ids"].shape[0] == 4
    assert [index for batch in (first, second) for row in batch.segments for _, index in row] == list(
        range(8)
    )
    for batch in (first, second):
        lengths = [length for row in batch.segments for length, _ in row]
        assert batch.num_tokens == sum(lengths) and batch.labels.shape[1] == max(lengths)
        assert batch.num_label_tokens == np.count_nonzero(batch.labels != -100)


@pytest.mark.parametrize(
    ("mask", "name"), [("block", "attention_mask"), ("start_end", "attn_mask_startend_row_indices")]
)
def test_streamed_bins_are_collated_as_packed_rows_are(make_stream, mask, name):
    samples = make_samples(9)
    rows = PackedRows(PackedSamples(samples, pack(np.arange(2, 11), 30, seed=1)), mask=mask, **PADDING)
    wanted = rows.batch(np.arange(2))
    given = make_row_builder(PADDING, mask)([rows.packed[0], rows.packed[1]])
    assert wanted.segments == given.segments
    arguments, others = wanted.tensors(), given.tensors()
    assert arguments.keys() == others.keys() >= {"input_ids", "position_ids", name}
    assert all(np.array_equal(tensor, others[key]) for key, tensor in arguments.items())
    (batch, _) = make_stream(size=2, row_length=40, mask=mask).batch(0).micro_batches
    assert name in batch.tensors() and max(len(row) for row in batch.segments) > 1


def test_ranks_of_a_stream_share_what_one_process_gets(make_stream):
    alone = make_stream(size=4, accumulated=2).batch(0).micro_batches
    ranks = [make_stream(size=2, accumulated=2, rank=rank, world=2).batch(0).micro_batches for rank in (0, 1)]

    def numbers(batches):
        return [index for batch in batches for row in batch.segments for _, index in row]

    assert numbers(alone) == numbers([batch for batches in ranks for batch in batches])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["padded", "packed", "stored", "streamed", "streamed packed"])
def test_every_rank_knows_the_tokens_of_the_whole_batch(make_stream, kind, world):
    labelled = [
        Sample(sample.input_ids, np.where(sample.input_ids % 3, sample.labels, -100), 0, False, False)
        for sample in make_samples(13)
    ]
    samples = [replace(each, num_label_tokens=int((each.labels != -100).sum())) for each in labelled]

    def make(rank):
        layout = {"rank": rank, "world": world}
        if kind.startswith("streamed"):
            packed = {"row_length": 40, "mask": "block"} if kind.endswith("packed") else {}
            return make_stream(size=1, **layout, **packed)
        rows = PaddedRows(store_of(samples) if kind == "stored" else samples, **PADDING)
        if kind == "packed":
            rows = PackedRows(PackedSamples(samples, pack(rows.lengths, 30, seed=1)), **PADDING)
        order = GlobalOrder(len(rows), global_batch_size=5, seed=1)
        return MapSource(rows, order, micro_batch_size=1, **layout)

    sources = [make(rank) for rank in range(world)]
    for step in range(3):
        batches = [source.batch(step) for source in sources]
        own = [each for batch in batches for each in batch.micro_batches]
        assert {batch.num_tokens for batch in batches} == {sum(each.num_tokens for each in own)}
        assert {batch.num_label_tokens for batch in batches} == {sum(each.num_label_tokens for each in own)}
        assert 0 < batches[0].num_label_tokens < batches[0].num_tokens or kind.startswith("streamed")


@pytest.mark.parametrize("is_prefetched", [False, True])
def test_a_stream_continues_from_its_checkpoint(make_stream, tmp_path, is_prefetched):
    whole: Any = make_stream()
    if is_prefetched:  # batch 3 is made, or in the making, when the position behind batch 2 is saved
        whole = PrefetchedSource(whole, 6)
    for step in range(3):
        whole.batch(step)
    position = whole.save(tmp_path, 3)
    assert [path.name for path in tmp_path.glob("*.npz")] == ["data_stream.npz"]
    other = make_stream()
    assert other.restore(tmp_path, position) is None
    for step in (3, 4):
        for left, right in zip(whole.batch(step).micro_batches, other.batch(step).micro_batches, strict=True):
            assert left.inputs["input_ids"].tobytes() == right.inputs["input_ids"].tobytes()
            assert left.segments == right.segments
        assert whole.epoch(step + 1) == other.epoch(step + 1)
    whole.close()


def test_a_stream_is_closed_while_a_thread_waits_for_its_answer(make_stream):
    source = PrefetchedSource(make_stream(), 10**6)
    for step in range(3):
        source.batch(step)
    assert source.close().startswith("Data, train, as far as read: ")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_checkpoints_of_another_kind_or_batch_size_are_refused(make_stream, tmp_path):
    source = make_stream()
    source.batch(0)
    position = source.save(tmp_path, 1)
    with pytest.raises(UserError, match="was written with global_batch_size 8, not 4"):
        make_stream(accumulated=1).restore(tmp_path, position)
    with pytest.raises(UserError, match="was written without lazy"):
        make_stream().restore(tmp_path, {"step": 1, "global_batch_size": 8})
