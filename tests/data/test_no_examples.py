"""Every way to end without a sample is named, with its count and what to do about it."""

from __future__ import annotations

import json

import pytest

from finetune.data.reading.mixing import DataSource, read_sources
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.dataset import load_prompts, load_samples
from finetune.data.stream.settings import StreamSettings
from finetune.data.stream.stream import SampleStream
from finetune.data.templates.template import PlainTemplate, load_template
from finetune.errors import UserError

PAIR = {"query": "q", "response": "a"}
UNLEARNED = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": False}]
}
REFUSING = (
    "{% if messages[0].content == 'q' %}{{ raise_exception('no q') }}{% endif %}{{ messages[0].content }}"
)


def read(files, *, skip=False, preference=None):
    sources = [DataSource(name=file.name, files=(file,)) for file in files]
    return read_sources(sources, ReadOptions(preference=preference), FaultCollector(skip=skip))


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"train": "false"}, {"loss_mask": 0.0}])
def test_all_examples_are_marked(write_lines, mark):
    file = write_lines(*[PAIR | mark] * 3)
    with pytest.raises(
        UserError, match=r"train\.json: no example found\. 3 examples are marked as not to be learned"
    ):
        read([file])
    with pytest.raises(UserError, match=r"3 examples are marked as not to be learned .*: take the marks out"):
        run_stream(file)


def test_all_examples_are_bad_answers_or_faulty(write_lines):
    file = write_lines(PAIR | {"label": False}, PAIR | {"label": False})
    with pytest.raises(
        UserError, match=r"2 examples are marked as bad answers .* give data with good answers"
    ):
        read([file], preference="chosen")
    file = write_lines(b"{", {"foo": 1}, PAIR | {"loss": 0})
    with pytest.raises(UserError) as caught:
        read([file], skip=True)
    assert "1 example is marked as not to be learned" in str(caught.value)
    assert f"2 lines were skipped, the first: {file}:1: not JSON" in str(caught.value)


def test_each_set_has_its_own_reasons(write_lines):
    files = [write_lines(PAIR | {"loss": False}, name="a.json"), write_lines(b"{", name="b.json"),
             write_lines(b"", name="c.json"), write_lines(PAIR, name="d.json")]  # fmt: skip
    with pytest.raises(UserError) as caught:
        read(files, skip=True)
    faults = caught.value.faults
    assert [fault.partition(":")[0] for fault in faults] == ["a.json", "b.json", "c.json"]
    assert "marked" in faults[0] and "skipped" not in faults[0]
    assert f"1 line was skipped: {files[1]}:1" in faults[1] and "marked" not in faults[1]
    assert "the files are empty. Expected lines such as" in faults[2]


CASES = [
    (UNLEARNED, {}, "all answers marked as not to be learned", "Take the marks"),
    (PAIR | {"response": " "}, {}, "empty response", "Fill in the answers"),
    ({"text": "  "}, {}, "empty text", "Fill in the texts"),
    (PAIR | {"query": "q" * 30}, {"truncation": "drop"}, "too long", "Raise max_length"),
    (
        PAIR | {"query": "q" * 30},
        {"src_length": 20},
        "no label token left within the length",
        "Leave more room",
    ),
]


@pytest.mark.parametrize(("record", "limits", "reason", "remedy"), CASES)
def test_nothing_of_an_example_is_left(write_lines, encoder, record, limits, reason, remedy):
    file = write_lines(record, record)
    limits = {"src_length": 10, "max_length": 20} | limits
    with pytest.raises(UserError) as caught:
        load_samples([file], encoder, PlainTemplate(), **limits)
    assert f"none of the 2 examples can be used with src_length {limits['src_length']}, max_length 20" in str(
        caught.value
    )
    assert f"(dropped: 2 ({reason})). {remedy}" in str(caught.value)
    with pytest.raises(UserError) as caught:
        run_stream(file, encoder, **limits)
    assert f"none of the 2 examples can be used (2 ({reason})). {remedy}" in str(caught.value)


def test_prompts_of_which_none_is_left(write_lines, encoder):
    file = write_lines(PAIR | {"query": "q" * 30}, PAIR | {"response": ""})
    with pytest.raises(UserError) as caught:
        load_prompts([file], encoder, PlainTemplate(), src_length=5, truncation="drop")
    assert "(dropped: 1 (empty response), 1 (too long))" in str(caught.value)
    assert "Fill in the answers" in str(caught.value) and "Raise max_length" in str(caught.value)


@pytest.mark.parametrize("load", [load_samples, load_prompts])
def test_the_template_refuses_all(tmp_path, write_lines, encoder, load):
    (tmp_path / "t.jinja").write_text(REFUSING + "{% for m in messages[1:] %}{{ m.content }}{% endfor %}")
    file = write_lines(PAIR, PAIR)
    lengths = {"src_length": 10} | ({"max_length": 20} if load is load_samples else {})
    with pytest.raises(UserError) as caught:
        load(
            [file], encoder, load_template(tmp_path / "t.jinja"), faults=FaultCollector(skip=True), **lengths
        )
    assert "(dropped: 2 (refused by the chat template)). Give chat_template another name or file." in str(
        caught.value
    )
    assert f"The first that was refused: {tmp_path}/t.jinja: fails on {file}:1: no q" in str(caught.value)


def run_stream(file, encoder=None, **limits):
    builder = BulkBuilder(
        encoder or Unasked(), PlainTemplate(), **({"src_length": 9, "max_length": 9} | limits)
    )
    stream = SampleStream([DataSource(name="d", files=(file,))], builder, StreamSettings(seed=1))
    stream.next_units(1)


class Unasked:
    eos_token_id, pad_token_id, prefix_ids = 0, 0, ()

    def encode(self, text):
        return []

    encode_special = encode


def test_conversations_without_any_template_are_told(tmp_path, write_lines, encoder):
    (tmp_path / "model").mkdir()
    template = load_template(None, tmp_path / "model")
    file = write_lines(PAIR, PAIR)
    limits = {"src_length": 10, "max_length": 20}
    said = load_samples([file], encoder, template, **limits)[1].describe()
    assert (
        "written as plain text, prompts and answers end to end, for want of a chat template in the model's folder "
        "(set chat_template, to chatml for example; none asks for plain text): 2 conversations"
    ) in said
    for data, asked in (
        (PAIR, load_template("none")),
        ({"src": "q", "tgt": "a"}, template),
        ({"text": "a"}, template),
    ):
        (tmp_path / "other.json").write_text(json.dumps(data))
        said = load_samples([tmp_path / "other.json"], encoder, asked, **limits)[1].describe()
        assert "for want" not in said
