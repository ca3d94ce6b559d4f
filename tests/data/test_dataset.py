import pytest

from finetune.data.reading.formats import read_conversations
from finetune.data.reading.records import FaultCollector
from finetune.data.reading.source import find_split
from finetune.data.samples.data_report import DataReport
from finetune.data.samples.dataset import load_prompts, load_samples
from finetune.data.templates.template import PlainTemplate
from finetune.errors import UserError
from tests.conftest import ROOT

PLAIN = PlainTemplate()


def test_samples_and_report(write_lines, encoder):
    file = write_lines(
        {"src": "ab", "tgt": "cd"},  # 1 + 2 + 2 + EOS
        {"src": "ab", "tgt": "cd"},
        b"",
        {"src": "a" * 20, "tgt": "b" * 20},  # both cut
        {"src": "a", "tgt": ""},
        {"src": ["a" * 20, "q"], "tgt": ["b", "r"]},  # one round dropped
    )
    samples, report = load_samples([file], encoder, PLAIN, src_length=5, max_length=10)
    assert [len(sample.input_ids) for sample in samples] == [5, 5, 9, 3]
    assert report == DataReport(
        files=(str(file),),
        num_lines=5,
        num_samples=4,
        num_tokens=22,
        num_label_tokens=3 + 3 + 5 + 2,
        num_truncated_source=1,
        num_truncated_target=1,
        num_dropped_rounds=1,
        num_dropped={"empty response": 1},
    )
    assert report.describe() == (
        "4 samples from 5 lines of 1 file; 22 tokens, 13 of them learned (59.1%); "
        "truncated: 1 source, 1 target; old rounds left out: 1; dropped: 1 (empty response)."
    )


def test_description_says_only_what_happened(write_lines, encoder):
    file = write_lines({"src": "ab", "tgt": "cd"})
    _, report = load_samples([file], encoder, PLAIN, src_length=5, max_length=10)
    assert report.describe() == "1 sample from 1 line of 1 file; 5 tokens, 3 of them learned (60.0%)."


def test_no_room(write_lines, encoder):
    file = write_lines({"src": "a", "tgt": "b"}, {"src": "a" * 9, "tgt": "b"})
    samples, report = load_samples([file], encoder, PLAIN, src_length=8, max_length=8)
    assert len(samples) == 1
    assert report.num_dropped == {"no label token left within the length": 1}


def test_prompts_and_report(write_lines, encoder):
    file = write_lines({"src": "ab", "tgt": "cd"}, {"src": "a" * 20, "tgt": "x"}, {"src": "a", "tgt": " "})
    prompts, report = load_prompts([file], encoder, PLAIN, src_length=5)
    assert [(prompt.source, prompt.target) for prompt in prompts] == [("ab", "cd"), ("a" * 20, "x")]
    assert report.describe() == (
        "2 samples from 3 lines of 1 file; 8 tokens; truncated: 1 source; dropped: 1 (empty response)."
    )


def test_prompts_without_any_token(write_lines, make_encoder):
    file = write_lines({"src": "", "tgt": "cd"}, {"src": "a", "tgt": "x"})
    prompts, report = load_prompts([file], make_encoder(prefix_ids=()), PLAIN, src_length=5)
    assert len(prompts) == 1
    assert report.num_dropped == {"empty prompt": 1}


def test_conversations_instead_of_files(write_lines, encoder):
    file = write_lines({"src": "ab", "tgt": "cd"}, {"src": "a", "tgt": "b"})
    from_file = load_samples([file], encoder, PLAIN, src_length=5, max_length=10)
    from_memory = load_samples(read_conversations([file]), encoder, PLAIN, src_length=5, max_length=10)
    assert from_memory[1] == from_file[1]
    assert [s.input_ids.tolist() for s in from_memory[0]] == [s.input_ids.tolist() for s in from_file[0]]


def test_empty_file(write_lines, encoder):
    file = write_lines(b"", b"  ")
    with pytest.raises(
        UserError, match=r"train\.json: no example found, the files are empty. Expected lines such as"
    ):
        load_samples([file], encoder, PLAIN, src_length=5, max_length=10)
    with pytest.raises(UserError, match="no example found, the files are empty"):
        load_prompts([file], encoder, PLAIN, src_length=5)


def test_no_sample_left(write_lines, encoder):
    file = write_lines({"src": "a", "tgt": ""}, {"src": "a" * 9, "tgt": "b"})
    with pytest.raises(UserError) as caught:
        load_samples([file], encoder, PLAIN, src_length=8, max_length=8)
    assert (
        "train.json: none of the 2 examples can be used with src_length 8, max_length 8 "
        "(dropped: 1 (empty response), 1 (no label token left within the length)). Fill in the answers"
    ) in str(caught.value)


def test_faulty_lines_are_told(write_lines, encoder):
    file = write_lines({"src": "a"}, b"oops")
    with pytest.raises(UserError) as caught:
        load_samples([file], encoder, PLAIN, src_length=8, max_length=8)
    assert len(caught.value.faults) == 2


def test_too_long_examples_are_counted_or_told(write_lines, encoder):
    file = write_lines({"src": "a", "tgt": "b"}, {"src": "a" * 9, "tgt": "b"}, {"src": "a", "tgt": "b" * 9})
    lengths = {"src_length": 5, "max_length": 8}
    samples, report = load_samples([file], encoder, PLAIN, truncation="drop", **lengths)
    assert len(samples) == 1 and report.num_dropped == {"too long": 2}
    with pytest.raises(UserError) as caught:
        load_samples([file], encoder, PLAIN, truncation="error", **lengths)
    assert caught.value.faults == (
        f"{file}:2: 12 tokens, allowed are 8: raise the length, or set truncation to left, right or drop",
        f"{file}:3: 12 tokens, allowed are 8: raise the length, or set truncation to left, right or drop",
    )
    prompts, report = load_prompts([file], encoder, PLAIN, truncation="drop", src_length=5)
    assert len(prompts) == 2 and report.num_dropped == {"too long": 1}


def test_system_text_for_examples_without_one(write_lines, encoder):
    file = write_lines({"src": "a", "tgt": "b"}, {"src": "a", "tgt": "b", "system": "mine"})
    prompts, _ = load_prompts([file], encoder, PLAIN, src_length=50, system="sys ")
    assert [prompt.source for prompt in prompts] == ["sys a", "minea"]


def test_skipped_lines_are_told(write_lines, encoder):
    file = write_lines({"src": "ab", "tgt": "cd"}, b"broken", b"broken")
    faults = FaultCollector(skip=True)
    conversations = read_conversations([file], faults=faults)
    _, report = load_samples(conversations, encoder, PLAIN, src_length=5, max_length=10)
    report.add_faults(faults)
    assert report.describe().endswith(
        f"; skipped: 2 faulty lines, the first: {file}:2: not JSON (Expecting value at character 1): broken."
    )


def test_sample_data_cut_to_length(encoder):
    """Prompts stop where the learned tokens of the samples begin, and these are the beginning of the answer."""
    for split in ("train", "dev"):
        files = find_split(ROOT / "data", split)
        num_cut = 0
        samples, report = load_samples(files, encoder, PLAIN, src_length=30, max_length=100)
        assert report.num_samples == report.num_lines == len(samples) > 0
        assert not report.num_dropped
        assert max(len(sample.input_ids) for sample in samples) == 99
        prompts, _ = load_prompts(files, encoder, PLAIN, src_length=30)
        assert len(prompts) == len(samples)
        for sample, prompt in zip(samples, prompts, strict=True):
            learned = [i for i in sample.labels.tolist() if i != -100]
            text = encoder.decode(learned)
            assert text.removesuffix("</s>") == prompt.target[: len(text.removesuffix("</s>"))]
            assert text.endswith("</s>") != sample.truncated_target
            assert sample.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
            num_cut += sample.truncated_target
        assert 0 < report.num_truncated_source < len(samples)
        assert 0 < num_cut < len(samples)
