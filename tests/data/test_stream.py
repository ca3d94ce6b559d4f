import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.reading.formats import ReadOptions
from finetune.data.reading.mixing import DataSource
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.stream.reader import SourceReader, check_streamable
from finetune.data.stream.settings import StreamSettings
from finetune.data.stream.state import StreamState, load_arrays, save_arrays
from finetune.data.stream.stream import SampleStream
from finetune.data.templates.template import PlainTemplate
from finetune.errors import UserError


@pytest.fixture
def make_stream(encoder):
    def make(*files: Path, ratios=None, max_samples=None, max_length=64, truncation="left", **more):
        sources = [
            DataSource(name=file.name, files=(file,), ratio=ratio, max_samples=max_samples)
            for file, ratio in zip(files, ratios or [None] * len(files), strict=True)
        ]
        builder = BulkBuilder(
            encoder, PlainTemplate(), src_length=32, max_length=max_length, truncation=truncation
        )
        return SampleStream(sources, builder, StreamSettings(**({"seed": 1} | more)))

    return make


def example(number: int) -> dict:
    return {"src": f"<{number}>", "tgt": "x" * (1 + number * 7 % 23)}


def write(file: Path, numbers) -> Path:
    file.write_text("".join(json.dumps(example(number)) + "\n" for number in numbers), encoding="utf-8")
    return file


@pytest.fixture
def lines(tmp_path) -> Path:
    return write(tmp_path / "train.jsonl", range(50))


def numbers_in(units, encoder) -> list[int]:
    """Which examples some units hold, in order."""
    text = "".join(encoder.decode(unit.input_ids[unit.input_ids > 3].tolist()) for unit in units)
    return [int(part.partition("<")[2]) for part in text.split(">")[:-1]]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name in ("input_ids", "labels", "segment_lengths", "sample_indices"):
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def through_files(state: StreamState, folder: Path) -> StreamState:
    save_arrays(folder, state.to_arrays())
    return StreamState.from_arrays(json.loads(json.dumps(state.position)), load_arrays(folder))


# Order


def test_a_pass_has_every_example_once_in_another_order_each_time(make_stream, lines, encoder):
    stream = make_stream(lines, shuffle_buffer_size=8)
    passes = [numbers_in(stream.next_units(50), encoder) for _ in range(3)]
    assert all(sorted(each) == list(range(50)) for each in passes)
    assert len({tuple(each) for each in [*passes, range(50)]}) == 4


def test_the_buffer_bounds_how_far_ahead_an_example_comes(make_stream, lines, encoder):
    order = numbers_in(make_stream(lines, shuffle_buffer_size=8).next_units(50), encoder)
    assert all(number < place + 8 for place, number in enumerate(order))
    assert numbers_in(make_stream(lines, shuffle_buffer_size=1).next_units(50), encoder) == list(range(50))


def test_the_order_depends_on_the_seed_alone(make_stream, lines):
    streams = [make_stream(lines, seed=seed, shuffle_buffer_size=8) for seed in (5, 5, 6)]
    first, again, other = [stream.next_units(70) for stream in streams]
    assert_same(first, again)
    with pytest.raises(AssertionError):
        assert_same(first, other)


def test_files_come_in_another_order_each_pass(tmp_path, encoder):
    files = tuple(write(tmp_path / f"{n}.jsonl", range(n * 10, n * 10 + 10)) for n in range(6))
    builder = BulkBuilder(encoder, PlainTemplate(), src_length=32, max_length=64)
    stream = SampleStream(
        [DataSource(name="all", files=files)], builder, StreamSettings(seed=3, shuffle_buffer_size=1)
    )
    firsts = [tuple(n // 10 for n in numbers_in(stream.next_units(60), encoder)[::10]) for _ in range(3)]
    assert all(sorted(order) == list(range(6)) for order in firsts)
    assert len(set(firsts)) == 3


def test_sources_mix_within_a_pass(make_stream, tmp_path, encoder):
    one = write(tmp_path / "one.jsonl", range(100, 200))
    two = write(tmp_path / "two.jsonl", range(200, 300))
    order = numbers_in(make_stream(one, two, shuffle_buffer_size=1).next_units(200), encoder)
    assert sorted(order) == list(range(100, 300))
    assert 30 < sum(number < 200 for number in order[:100]) < 70


def test_ratios_decide_the_shares_and_small_sets_repeat(make_stream, tmp_path, encoder):
    small = write(tmp_path / "small.jsonl", range(100, 110))
    large = write(tmp_path / "large.jsonl", range(200, 300))
    stream = make_stream(small, large, ratios=[3, 1], shuffle_buffer_size=16)
    order = numbers_in(stream.next_units(800), encoder)
    assert sum(number < 200 for number in order) == pytest.approx(600, abs=60)
    counts = Counter(number for number in order if number < 200)
    assert max(counts.values()) - min(counts.values()) <= 10


def test_max_samples_takes_the_first_of_each_pass(make_stream, lines, encoder):
    stream = make_stream(lines, max_samples=5, shuffle_buffer_size=100)
    assert [sorted(numbers_in(stream.next_units(5), encoder)) for _ in range(2)] == [list(range(5))] * 2


def test_the_epoch_counts_what_was_given_out(make_stream, lines):
    stream = make_stream(lines, shuffle_buffer_size=8)
    assert stream.epoch == 0
    stream.next_units(25)
    assert stream.epoch == pytest.approx(0.5, abs=0.08)
    for done in (50, 75, 100):
        stream.next_units(25)
        assert stream.epoch == pytest.approx(done / 50, abs=1e-9 if done > 50 else 0.01)


# Packing


def test_packing_loses_and_doubles_nothing_and_keeps_to_the_row_length(make_stream, lines, encoder):
    stream = make_stream(lines, row_length=64, shuffle_buffer_size=20)
    found: list[int] = []
    tokens, units = 0, []
    while len(found) < 100:
        (unit,) = stream.next_units(1)
        units.append(unit)
        assert len(unit.input_ids) == unit.segment_lengths.sum() <= 64
        found += numbers_in([unit], encoder)
        tokens += len(unit.input_ids)
    assert sorted(found[:50]) == sorted(found[50:100]) == list(range(50))  # a pass ends with its own bins
    indices = np.concatenate([unit.sample_indices for unit in units])
    assert len(set(indices.tolist())) == len(indices)
    assert tokens / (64 * len(units)) > 0.85


def test_packed_and_unpacked_rows_hold_the_same_samples(make_stream, lines):
    plain = {int(unit.sample_indices[0]): unit for unit in make_stream(lines).next_units(50)}
    packed = make_stream(lines, row_length=64).next_units(8)
    for unit in packed:
        ends = np.cumsum(unit.segment_lengths)[:-1]
        parts = zip(
            unit.sample_indices, np.split(unit.input_ids, ends), np.split(unit.labels, ends), strict=True
        )
        for number, ids, labels in parts:
            assert ids.tobytes() == plain[int(number)].input_ids.tobytes()
            assert labels.tobytes() == plain[int(number)].labels.tobytes()


# Position


@pytest.mark.parametrize("row_length", [None, 64])
@pytest.mark.parametrize("buffer_size", [1, 7, 1000])
def test_any_state_continues_with_the_same_bytes(make_stream, lines, tmp_path, row_length, buffer_size):
    options = {"row_length": row_length, "shuffle_buffer_size": buffer_size}
    whole = make_stream(lines, **options)
    states, units = [], []
    for _ in range(40):
        states.append(whole.state())
        units.append(whole.next_units(3))
    for step in range(0, 40, 3):
        other = make_stream(lines, **options)
        other.restore(through_files(states[step], tmp_path))
        for expected in units[step : step + 5]:
            assert_same(other.next_units(3), expected)
        assert other.epoch == make_epoch(make_stream, lines, options, min(step + 5, 40))


def make_epoch(make_stream, lines, options, steps):
    stream = make_stream(lines, **options)
    stream.next_units(3 * steps)
    return stream.epoch


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_restored_streams_continue_whatever_the_settings(make_stream_for_hypothesis, data):
    make, files, folder = make_stream_for_hypothesis
    chosen = data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=4, unique=True))
    ratios = data.draw(st.none() | st.lists(st.floats(0.1, 5), min_size=len(chosen), max_size=len(chosen)))
    options = {
        "ratios": ratios,
        "seed": data.draw(st.integers(0, 2**32 - 1)),
        "row_length": data.draw(st.sampled_from([None, 64, 200])),
        "shuffle_buffer_size": data.draw(st.integers(1, 60)),
    }
    before, after = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 40))
    whole = make(*chosen, **options)
    for _ in range(before):
        whole.next_units(1)
    other = make(*chosen, **options)
    other.restore(through_files(whole.state(), folder))
    assert_same(other.next_units(after), whole.next_units(after))
    left, right = whole.state(), other.state()
    assert left.position == right.position
    assert left.to_arrays().keys() == right.to_arrays().keys()
    for name, array in left.to_arrays().items():
        assert array.tobytes() == right.to_arrays()[name].tobytes()


@pytest.fixture(scope="module")
def make_stream_for_hypothesis(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    listed = folder / "list.json"
    listed.write_text(json.dumps([example(number) for number in range(20, 33)]))
    table = folder / "table.csv"
    rows = "".join(f"<{number}>,{'y' * (number % 9 + 1)}\n" for number in range(40, 55))
    table.write_text("query,response\n" + rows)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "z" * (n + 1)}) + "\n\n" for n in range(9)))
    files = [write(folder / "lines.jsonl", range(17)), listed, table, text]

    def make(*chosen, ratios=None, **more):
        sources = [
            DataSource(name=file.name, files=(file,), ratio=ratio)
            for file, ratio in zip(chosen, ratios or [None] * len(chosen), strict=True)
        ]
        builder = BulkBuilder(encoder, PlainTemplate(), src_length=32, max_length=64)
        return SampleStream(sources, builder, StreamSettings(**more))

    return make, files, folder


def test_a_state_does_not_change_when_the_stream_goes_on(make_stream, lines):
    stream = make_stream(lines, row_length=64, shuffle_buffer_size=9)
    stream.next_units(2)
    state = stream.state()
    before = json.dumps(state.position), {name: a.tobytes() for name, a in state.to_arrays().items()}
    stream.next_units(10)
    assert before == (
        json.dumps(state.position),
        {name: a.tobytes() for name, a in state.to_arrays().items()},
    )


def test_a_checkpoint_of_other_data_or_settings_is_refused(make_stream, lines, tmp_path):
    state = make_stream(lines, shuffle_buffer_size=9).state()
    with pytest.raises(UserError, match=r"shuffle_buffer_size 9, this run has 10.*start anew"):
        make_stream(lines, shuffle_buffer_size=10).restore(state)
    write(lines, range(51))
    with pytest.raises(UserError, match=r"other data files \(changed or new: train.jsonl \("):
        make_stream(lines, shuffle_buffer_size=9).restore(state)


# Faults


def test_a_faulty_line_stops_with_file_and_line(make_stream, write_lines):
    file = write_lines(
        *[example(n) for n in range(20)], b'{"src": "a", "tgt"', *[example(n) for n in range(5)]
    )
    stream = make_stream(file, shuffle_buffer_size=4)
    assert len(stream.next_units(16)) == 16
    with pytest.raises(UserError, match=rf"{file}:21: not JSON"):
        stream.next_units(10)


def test_skipped_lines_are_counted_and_leave_the_rest(make_stream, write_lines, encoder):
    file = write_lines(example(0), b"{", example(1), {"tgt": "x"}, example(2))
    stream = make_stream(file, skip_bad_lines=True, shuffle_buffer_size=9)
    assert sorted(numbers_in(stream.next_units(3), encoder)) == [0, 1, 2]
    assert stream.report.num_faulty_lines == 2
    assert f"skipped: 2 faulty lines, the first: {file}:2:" in stream.report.describe()


def test_formats_may_differ_inside_a_file(make_stream, write_lines, encoder):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
    stream = make_stream(write_lines(example(0), {"messages": messages}, example(1)))
    assert len(stream.next_units(3)) == 3
    rule = "examples of another format than the file begins with (messages in a file of src_tgt)"
    assert stream.report.notes.rules[rule] == 1


def test_what_cannot_be_used_at_all_is_an_error_and_no_endless_loop(make_stream, write_lines):
    with pytest.raises(UserError, match="no example found"):
        make_stream(write_lines(b"", name="empty.jsonl")).next_units(1)
    with pytest.raises(UserError, match="none of the 2 examples can be used"):
        make_stream(write_lines({"src": "a", "tgt": ""}, {"src": "b", "tgt": " "})).next_units(1)
    pairs = write_lines({"prompt": "a", "chosen": "b", "rejected": "c"}, name="pairs.jsonl")
    with pytest.raises(UserError, match="these are preference pairs"):
        make_stream(pairs).next_units(1)
    unit = make_stream(pairs, options=ReadOptions(preference="chosen")).next_units(1)
    assert len(unit) == 1


def test_samples_that_are_too_long_stop_or_are_counted(make_stream, write_lines):
    file = write_lines(example(1), {"src": "a", "tgt": "b" * 100})
    stream = make_stream(file, truncation="drop")
    stream.next_units(3)
    assert stream.report.num_dropped["too long"] == 3
    with pytest.raises(UserError, match=rf"{file}:2: 103 tokens, allowed are 64"):
        make_stream(file, truncation="error", stop_at_too_long=True).next_units(3)


def test_a_large_list_is_refused_with_the_way_out(tmp_path, monkeypatch):
    file = tmp_path / "big.json"
    file.write_text(" [" + "{}," * 1000 + "{}]")
    check_streamable([DataSource(name="big", files=(file,))])
    monkeypatch.setattr("finetune.data.stream.reader.MAX_LIST_BYTES", 1000)
    with pytest.raises(UserError, match=r"big.json is a JSON list .* `jq -c"):
        check_streamable([DataSource(name="big", files=(file,))])


@pytest.mark.parametrize("at_once", [1, 7])
def test_how_many_are_tokenised_at_once_changes_nothing(make_stream, lines, tmp_path, monkeypatch, at_once):
    options = {"row_length": 64, "shuffle_buffer_size": 5}
    expected = make_stream(lines, **options).next_units(60)
    monkeypatch.setattr("finetune.data.stream.tokenized_reader.NUM_AT_ONCE", at_once)
    assert_same(make_stream(lines, **options).next_units(60), expected)
    for done in (3, 11, 30):
        whole, other = make_stream(lines, **options), make_stream(lines, **options)
        whole.next_units(done)
        other.restore(through_files(whole.state(), tmp_path))
        assert_same(other.next_units(20), expected[done : done + 20])


def test_the_size_of_a_pass_is_known_when_its_last_example_is_read(lines):
    reader = SourceReader(DataSource(name="all", files=(lines,)), ReadOptions(), FaultCollector(), seed=0)
    assert reader.estimate_size() is None
    estimates = []
    while reader.next() is not None:
        reader.note_kept(1)
        estimates.append(reader.estimate_size())
    assert reader.estimate_size() == len(estimates), "between the end of a pass and the beginning of the next"
    assert estimates[-1] == pytest.approx(len(estimates))
    assert all(0.5 < each / len(estimates) < 2 for each in estimates[len(estimates) // 2 :])
    reader.begin_pass()
    assert reader.size == len(estimates)
