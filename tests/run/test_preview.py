"""The preview: what it prints is what is trained, without Paddle, weights or an output folder."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from finetune.data.samples.data_report import DataReport
from finetune.data.samples.dataset import load_samples
from finetune.data.samples.tokenize import IGNORE_INDEX, Prompt, Sample
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from finetune.run.preview.tables import count_prompts, count_samples, print_figures
from finetune.run.preview.tokens import MAX_ROWS, Example, TokenReader, print_example
from finetune.settings.arguments import parse_arguments
from finetune.tokenizers import fast_encoder
from tests.conftest import ROOT, launch, write_arguments

NO_PADDLE = """
import sys
import finetune_generation
from finetune.processes.command import run_command

code = run_command(finetune_generation.main)
print("loaded:", *sorted({"paddle", "paddlenlp"} & sys.modules.keys()))
sys.exit(code)
"""


def make_sample(ids, num_source, **cut) -> Sample:
    tokens = np.array(ids, dtype=np.int32)
    flags = np.arange(len(tokens)) >= num_source
    labels = np.where(flags, tokens, IGNORE_INDEX).astype(np.int32)[1:]
    return Sample(
        input_ids=tokens[:-1],
        labels=labels,
        num_label_tokens=int((labels != IGNORE_INDEX).sum()),
        truncated_source=cut.get("source", False),
        truncated_target=cut.get("target", False),
        num_dropped_rounds=cut.get("rounds", 0),
    )


class Vocabulary:
    """A tokenizer that knows its pieces by heart.

    Text is encoded piece by piece, the longest first; `decode` joins bytes or text.
    """

    eos_token_id, pad_token_id, prefix_ids = 0, 0, (1,)

    def __init__(self, *pieces, names=("</s>", "<s>"), decoded=None):
        self.names = list(names)
        self.all = [*names, *pieces]
        self.decoded = decoded or {}

    def pieces(self, ids):
        return [self.all[index] for index in ids]

    def encode(self, text):
        return [self.all.index("Ċ")] if text == "\n" and "Ċ" in self.all else [0]

    def encode_special(self, text):
        return [self.names.index(text)] if text in self.names else [0]

    def decode(self, ids):
        return self.decoded.get(tuple(ids), "\ufffd")


def texts(vocabulary, *ids):
    return [token.text for token in TokenReader(vocabulary).read(ids)]


# The run


def test_without_paddle_weights_or_output_folder(weightless, small_data, tmp_path):
    settings = {"model_name_or_path": str(weightless), "dataset_name_or_path": str(small_data)}
    path = write_arguments(tmp_path / "arguments.json", **settings, device="cpu", zero_padding=True)
    done = launch("-c", NO_PADDLE, path, "--preview", 1, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].strip() == "loaded:"
    assert done.stderr == ""
    assert "Sample 1" in done.stdout and "Sample 2" not in done.stdout
    assert not (tmp_path / "out").exists()


def shown_ids(output):
    return [
        int(word) for line in output.splitlines() if re.fullmatch(r"[ \d]+", line) for word in line.split()
    ]


def test_shows_the_ids_that_are_trained_and_marks_the_learned_ones(preview, weightless, small_data):
    code, out, err = preview(3, max_length=90, src_length=40)
    assert code == 0, err
    from finetune.families.family import find_family

    family = find_family(json.loads((weightless / "config.json").read_text()))
    encoder, _ = fast_encoder.load_fast_encoder(weightless, family)
    samples, _ = load_samples(
        [small_data / "train.json"], encoder, load_template(None), src_length=40, max_length=90
    )
    examples = [Example.of_sample(sample) for sample in samples[:3]]
    shown = out.partition("Training data")[0]
    assert shown_ids(shown) == [index for example in examples for index in example.ids]
    pieces = [
        line for line in shown.splitlines() if line.startswith("  ") and not re.fullmatch(r"[ \d]+", line)
    ]
    marked = re.findall(r"\[\[(.*?)\]\]", " ".join(pieces))
    assert [len(words.split()) for words in marked] == [sum(example.learned) for example in examples]
    for number, example in enumerate(examples, 1):
        assert f"Sample {number}  {len(example.ids)} tokens, {sum(example.learned)} learned" in shown


def test_figures_of_both_splits(preview, small_data):
    code, out, err = preview(1, do_eval=True, zero_padding=True, max_length=200)
    assert code == 0, err
    train, _, dev = out.partition("Evaluation data")
    assert re.search(r"samples +40 +from 40 examples of 1 file", train)
    assert re.search(r"samples +10 +from 10 examples of 1 file", dev)
    assert "Sample" not in dev
    for part in (train, dev):
        assert re.search(r"packed rows +\d+ +of 200 tokens, \d\d\.\d\d% full", part)


def test_reasons_duplicates_and_skipped_lines(preview, tmp_path):
    rows = [{"src": "a b", "tgt": "c"}] * 3 + [{"src": "a", "tgt": " "}, {"src": "a", "tgt": "word " * 200}]
    lines = [*map(json.dumps, rows), "broken"]
    (tmp_path / "train.json").write_text("\n".join(lines), encoding="utf-8")
    code, out, err = preview(
        9, dataset_name_or_path=str(tmp_path / "train.json"), truncation="drop", on_bad_line="skip"
    )
    assert code == 0, err
    assert re.search(r"samples +3 ", out) and "Sample 3" in out and "Sample 4" not in out
    assert re.search(r"dropped +1 +empty response\n +1 +too long", out)
    assert re.search(r"duplicates +2 ", out)
    assert re.search(r"skipped lines +1 +the first: ", out)
    assert "packed" not in out


def test_a_run_that_only_evaluates_by_generation_shows_its_prompts(preview):
    code, out, err = preview(1, do_train=False, do_eval=True, eval_with_do_generation=True)
    assert code == 0, err
    assert "Training data" not in out and "learned tokens" not in out and "[[" not in out.partition("\n")[2]
    assert "expected: " in out and re.search(r"samples +10 ", out)


def test_faulty_data_end_as_in_a_run(preview, tmp_path):
    (tmp_path / "train.json").write_text('{"src": "a"}\n', encoding="utf-8")
    code, out, err = preview(dataset_name_or_path=str(tmp_path / "train.json"))
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'train.json'}:1: " in err


def test_paddlenlp_reads_a_tokenizer_that_is_not_known_to_agree(preview, monkeypatch):
    code, expected, err = preview(2)
    assert (code, err) == (0, "")
    monkeypatch.setattr(fast_encoder, "load_fast_encoder", lambda *_, **__: (None, "it has a pepper"))
    code, out, err = preview(2)
    assert code == 0
    # Announced where no earlier test of this process has loaded it.
    told = err.removeprefix("Loading PaddlePaddle ...\n")
    assert told == "Reading the tokenizer with PaddleNLP: it has a pepper.\n"
    assert out == expected


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("instructions.json", {"chat_template": "alpaca"}),
        ("instructions.json", {"chat_template": "llama2"}),
        ("tool_calls.json", {"chat_template": "vicuna"}),
        ("texts.jsonl", {"truncation": "right"}),
        ("preferences.json", {"preference": "chosen"}),
    ],
)
def test_data_sets_of_other_tools(preview, data_sets, name, settings):
    code, out, err = preview(2, dataset_name_or_path=str(data_sets[name]), **settings)
    assert code == 0, err
    assert "Sample 2" in out and re.search(r"learned tokens +[\d,]+ +\d", out)
    assert max(map(cell_len, out.splitlines())) <= 80


# The settings


def test_needs_neither_task_nor_output_folder(weightless, small_data):
    words = ["--model_name_or_path", str(weightless), "--dataset_name_or_path", str(small_data)]
    args = parse_arguments([*words, "--preview", "3"])
    assert args.data.preview == 3 and args.training.do_train
    with pytest.raises(UserError, match="output_dir is missing"):
        parse_arguments(words)
    with pytest.raises(UserError, match="preview is -1: it must be at least 0"):
        parse_arguments([*words, "--preview", "-1"])


# Pieces


def test_bytes_of_a_character_end_with_the_character():
    vocabulary = Vocabulary("▁a", "<0xE4>", "<0xBD>", "<0xA0>", "<0x0A>")
    assert texts(vocabulary, 1, 2, 3, 4, 5, 6, 0) == ["<s>", "▁a", "<E4>", "<BD>", "<A0>你", "\\n", "</s>"]
    assert texts(vocabulary, 3, 2, 4) == ["<E4>", "▁a", "<BD>"]  # cut off, and a lone continuation


def test_byte_level_pieces_are_read_as_text():
    pieces = ("Ġword", "Ċ", "ä½łå", "¥½")
    assert texts(Vocabulary(*pieces), 2, 3, 4, 5) == ["▁word", "\\n", "你<E5>", "<A5><BD>好"]
    raw = (b" word", b"\n", "你".encode() + b"\xe5", b"\xa5\xbd")
    assert texts(Vocabulary(*raw), 2, 3, 4, 5) == ["▁word", "\\n", "你<E5>", "<A5><BD>好"]


def test_parts_whose_bytes_are_not_told_are_completed_by_decoding():
    vocabulary = Vocabulary("ab", "，\ufffd", "\ufffd", decoded={(3, 4): "，你"})
    assert texts(vocabulary, 2, 3, 4, 2) == ["ab", "，<?>", "<?>你", "ab"]
    assert texts(vocabulary, 2, 4) == ["ab", "\ufffd"]


def test_special_tokens_are_told_from_their_names_in_the_text():
    vocabulary = Vocabulary("<b>", "<|end|>", names=("</s>", "<s>", "<|call|>"))
    read = TokenReader(vocabulary).read([0, 1, 2, 3])
    assert [token.special for token in read] == [True, True, True, False]


def test_control_characters_cannot_reach_the_terminal():
    assert texts(Vocabulary("\x1b[2J"), 2) == ["\\x1b[2J"]


# The screen


def render(example, vocabulary, *, width=80, color=None):
    console = Console(
        file=io.StringIO(), width=width, force_terminal=bool(color), color_system=color, highlight=False
    )
    print_example(console, "Sample 1", example, TokenReader(vocabulary))
    return console.file.getvalue()


CHINESE = Vocabulary("▁的", "世纪", "，", "word", "<0xE4>", "▁", *(f"▁piece{i}" for i in range(30000)))


def starts(line):
    """Columns of the terminal in which the words of a line begin."""
    return [cell_len(line[: found.start()]) for found in re.finditer(r"\S+", line)]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_every_piece_stands_above_its_id(width):
    ids = [*np.random.default_rng(0).integers(2, 30000, 20).tolist(), *[2, 3, 4] * 3]
    out = render(Example.of_sample(make_sample([1, *ids, 0], 9)), CHINESE, width=width)
    lines = out.splitlines()[2:]
    pieces, numbers = lines[::2], lines[1::2]
    assert shown_ids(out) == [1, *ids, 0]
    for above, below in zip(pieces, numbers, strict=True):
        assert cell_len(above) <= width
        places = [
            start + 2 * word.startswith("[[")
            for start, word in zip(starts(above), above.split(), strict=True)
        ]
        assert places == starts(below)


@pytest.mark.parametrize("num_source", [2, 1500, 2990])
def test_long_samples_are_shown_in_part_and_nothing_is_lost_from_the_count(num_source):
    ids = [1, *np.random.default_rng(1).integers(2, 30000, 3000).tolist(), 0]
    example = Example.of_sample(make_sample(ids, num_source))
    out = render(example, CHINESE)
    lines = out.splitlines()[2:]
    gaps = [int(found.replace(",", "")) for found in re.findall(r"… ([\d,]+) more tokens", out)]
    shown = shown_ids(out)
    assert gaps and len(shown) + sum(gaps) == len(ids)
    assert shown[:5] == ids[:5] and shown[-5:] == ids[-5:] and ids[num_source] in shown
    assert len(lines) <= 2 * MAX_ROWS
    assert out.count("[[") == out.count("]]") and re.search(r"\[\[\S", out)


def test_learned_tokens_are_green_where_there_are_colours():
    out = render(Example.of_sample(make_sample([1, 2, 3, 0], 2)), CHINESE, color="standard")
    assert "\x1b[32m世纪\x1b[0m" in out and "\x1b[1;32m</s>\x1b[0m" in out and "[[" not in out
    assert "\x1b[1;36m<s>\x1b[0m" in out and "▁的" in out


def test_cuts_are_told_beside_the_sample():
    out = render(Example.of_sample(make_sample([1, 2, 3], 2, source=True, target=True, rounds=2)), CHINESE)
    assert "Sample 1  3 tokens, 1 learned; source cut; target cut; 2 old rounds left out\n" in out


def figures(report, counted, *, width=80, encoding="utf-8"):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="replace")
    print_figures(Console(file=stream, width=width, highlight=False), "Training data", report, counted)
    stream.flush()
    return raw.getvalue().decode(encoding)


def make_report(samples, **counts):
    return DataReport(
        files=("train.json",), num_lines=len(samples), num_samples=len(samples),
        num_tokens=sum(len(each.input_ids) for each in samples),
        num_label_tokens=sum(each.num_label_tokens for each in samples), **counts,
    )  # fmt: skip


def test_the_table_and_the_histogram():
    samples = [make_sample([1, *range(2, 2 + n), 0], 2) for n in (3, 3, 9, 24, 80)]
    counted = count_samples(samples, pack_to=100, seed=1)
    assert counted.num_duplicates == 1
    assert counted.lengths.tolist() == [4, 4, 10, 25, 81]
    out = figures(make_report(samples, num_truncated_source=1, num_truncated_target=2), counted)
    assert re.search(r"tokens +124 ", out) and re.search(r"learned tokens +119 +96.0%", out)
    assert re.search(r"truncated sources +1\n", out) and re.search(r"truncated targets +2\n", out)
    assert re.search(r"packed rows +2 +of 100 tokens, 62\.00% full", out)
    bars = re.findall(r"^ +(\d+) - (\d+) +(\d+) +([\d.]+)%  ?(█*)", out, flags=re.MULTILINE)
    assert [(int(low), int(high), int(count)) for low, high, count, *_ in bars if count != "0"] == [
        (1, 10, 3), (21, 30, 1), (81, 90, 1),
    ]  # fmt: skip
    assert sum(int(count) for _, _, count, *_ in bars) == 5
    assert len(bars[0][4]) == 3 * len(bars[2][4]) + 1  # 40 columns against 13 1/3
    assert "shortest 4, median 10, 95% up to 81, longest 81" in out


def test_the_last_token_counts_for_duplicates():
    first, second = make_sample([1, 2, 3], 1), make_sample([1, 2, 4], 1)
    assert count_samples([first, second], pack_to=None, seed=0).num_duplicates == 0
    prompts = [
        Prompt(input_ids=np.array(ids, dtype=np.int32), source="", target="") for ids in ([1], [1], [2])
    ]
    assert count_prompts(prompts).num_duplicates == 1


@pytest.mark.parametrize("lengths", [[1], [7, 7], [1, 2048], [1999, 2001], list(range(1, 12))])
def test_any_lengths_make_at_most_ten_bars(lengths):
    samples = [make_sample([1] * n + [0], 1) for n in lengths]
    out = figures(make_report(samples), count_samples(samples, pack_to=None, seed=0))
    counts = [
        int(found)
        for found in re.findall(
            r"^ +[\d,]+(?: - [\d,]+)? +(\d+)  ", out.partition("of a sample")[2], flags=re.MULTILINE
        )
    ]
    assert 1 <= len(counts) <= 10 and sum(counts) == len(lengths)


def test_bars_of_letters_where_the_stream_has_no_blocks():
    samples = [make_sample([1, 2, 0], 1)]
    out = figures(make_report(samples), count_samples(samples, pack_to=None, seed=0), encoding="latin-1")
    assert "#" * 40 in out and "?" not in out.partition("tokens of a sample")[2]


def test_documented():
    assert "--preview" in (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
