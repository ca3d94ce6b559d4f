"""Continued pre-training: long texts become several samples, and nothing of them is lost."""

import numpy as np
import pytest

from finetune.data.reading.mixing import DataSource
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.dataset import load_samples
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.data.stream.settings import StreamSettings
from finetune.data.stream.state import StreamState
from finetune.data.stream.stream import SampleStream
from finetune.data.templates.template import PlainTemplate, load_template
from finetune.errors import UserError

LENGTHS = {"src_length": 8, "max_length": 9}
TEXTS = ["x", "short", "exactly8", "exactly9!", "0123456789abcdefghijklmnopqrstuvwxyz", "end"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n".join(TEXTS))
    return path


def labels_of(samples):
    return [label for sample in samples for label in sample.labels if label != IGNORE_INDEX]


@pytest.mark.parametrize("template", [None, "vicuna"])
@pytest.mark.parametrize("truncation", ["left", "right", "drop", "error"])
def test_every_token_is_learned_once(file, encoder, template, truncation):
    samples, report = load_samples(
        [file], encoder, load_template(template), split_texts=True, truncation=truncation, **LENGTHS
    )
    assert labels_of(samples) == [
        id for text in TEXTS for id in [*encoder.encode(text), encoder.eos_token_id]
    ]
    assert all(len(sample.input_ids) < LENGTHS["max_length"] for sample in samples)
    assert all((np.array(sample.labels) != IGNORE_INDEX).all() for sample in samples)
    assert report.num_label_tokens == sum(map(len, TEXTS)) + len(TEXTS)
    assert report.notes.rules == {"texts longer than max_length divided into several samples": 3}
    assert not report.num_dropped and not report.num_truncated_target


def test_blocks_of_one_text_overlap_by_one_token(file, encoder):
    samples, _ = load_samples([file], encoder, PlainTemplate(), split_texts=True, **LENGTHS)
    shown = [encoder.decode([*sample.input_ids, sample.labels[-1]]) for sample in samples]
    assert shown[2:6] == ["<s>exactly8", "8</s>", "<s>exactly9", "9!</s>"]
    assert shown[6:8] == ["<s>01234567", "789abcdef"] and shown[-2].endswith("xyz</s>")


@pytest.mark.parametrize(("truncation", "num_kept"), [("left", 6), ("right", 6), ("drop", 3)])
def test_without_splitting_truncation_decides(file, encoder, truncation, num_kept):
    samples, report = load_samples([file], encoder, PlainTemplate(), truncation=truncation, **LENGTHS)
    assert len(samples) == num_kept and report.num_truncated_target + sum(report.num_dropped.values()) == 3


def test_conversations_are_not_divided(write_lines, encoder):
    source = write_lines({"src": "a" * 20, "tgt": "b" * 20})
    samples, _ = load_samples([source], encoder, PlainTemplate(), split_texts=True, **LENGTHS)
    assert len(samples) == 1 and samples[0].truncated_source


def make_stream(file, encoder, **settings):
    builder = BulkBuilder(encoder, PlainTemplate(), split_texts=True, **LENGTHS)
    return SampleStream([DataSource(name="d", files=(file,))], builder, StreamSettings(seed=3, **settings))


def test_a_stream_gives_the_same_samples_and_counts(file, encoder):
    stream = make_stream(file, encoder, shuffle_buffer_size=1)
    samples, report = load_samples([file], encoder, PlainTemplate(), split_texts=True, **LENGTHS)
    streamed = stream.read_first(100)
    assert [each.input_ids.tolist() for each in streamed] == [each.input_ids.tolist() for each in samples]
    assert stream.report.notes == report.notes and stream.report.num_samples == report.num_samples
    assert stream.report.num_lines == len(TEXTS)


@pytest.mark.parametrize("row_length", [None, 30])
@pytest.mark.parametrize("num_before", [1, 4, 11])
def test_a_stream_goes_on_with_the_very_same_rows(file, encoder, row_length, num_before):
    whole = make_stream(file, encoder, shuffle_buffer_size=5, row_length=row_length)
    expected = [unit.input_ids.tolist() for unit in whole.next_units(30)]
    stopped = make_stream(file, encoder, shuffle_buffer_size=5, row_length=row_length)
    stopped.next_units(num_before)
    state = stopped.state()
    saved = StreamState.from_arrays(state.position, state.to_arrays())
    going_on = make_stream(file, encoder, shuffle_buffer_size=5, row_length=row_length)
    going_on.restore(saved)
    rest = [unit.input_ids.tolist() for unit in going_on.next_units(30 - num_before)]
    assert rest == expected[num_before:]
    assert going_on.report.notes == whole.report.notes


def test_a_blank_text_is_no_document(tmp_path, encoder):
    (tmp_path / "t.txt").write_text(" \n\n\t\n")
    with pytest.raises(UserError, match="no example found"):
        load_samples([tmp_path / "t.txt"], encoder, PlainTemplate(), split_texts=True, **LENGTHS)
