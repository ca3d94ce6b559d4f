"""The preview of preference data: a prompt, its answers below it, and what is to be known of all of them."""

import io
import re

import numpy as np
from rich.console import Console

from finetune.data.preference.dataset import load_preferences
from finetune.data.preference.sample import PreferenceSample
from finetune.data.reading.formats import read_conversations
from finetune.data.reading.read_options import ReadOptions
from finetune.data.templates.template import load_template
from finetune.families.family import get_family
from finetune.run.preview.preferences import count_preferences, print_preferences
from finetune.run.preview.tables import print_figures
from finetune.run.preview.tokens import TokenReader
from finetune.tokenizers.fast_encoder import load_fast_encoder
from tests.conftest import ROOT

FILE = ROOT / "data" / "preference" / "dev.json"


def printed(show):
    stream = io.StringIO()
    show(Console(file=stream, width=120, color_system=None))
    return stream.getvalue()


def ids_of(part):
    return [int(word) for line in part.splitlines() if re.fullmatch(r"[ \d]+", line) for word in line.split()]


def load(weightless, comparison):
    encoder, _ = load_fast_encoder(weightless, get_family("llama"))
    conversations = read_conversations([FILE], ReadOptions(comparison=comparison))
    return encoder, *load_preferences(
        conversations, encoder, load_template(None), src_length=40, max_length=600
    )


def test_both_answers_stand_below_their_prompt(weightless):
    encoder, samples, report = load(weightless, "pairs")
    out = printed(lambda console: print_preferences(console, samples[:2], TokenReader(encoder)))
    assert out.startswith("The answers that are compared are in [[ ]]; below each token stands its id.")
    parts = re.split(r"\n\nPair ", out)[1:]
    assert [part.split("  ")[0] for part in parts] == [
        f"{number}: {what}" for number in (1, 2) for what in ("prompt", "chosen", "rejected")
    ]
    shown = [ids for sample in samples[:2] for ids in (sample.prompt_ids, *sample.answers)]
    assert [ids_of(part) for part in parts] == [ids.tolist() for ids in shown]
    assert all(("[[" in part and "]]" in part) == ("prompt" not in part) for part in parts)
    figures = count_preferences(samples, pack_to=700, seed=1)
    table = printed(lambda console: print_figures(console, "Training data", report, figures))
    means = [np.mean([len(sample.answers[place]) for sample in samples]) for place in (0, 1)]
    assert re.search(rf"chosen answers +80 +{means[0]:.1f} tokens each, on average", table)
    assert re.search(rf"rejected answers +80 +{means[1]:.1f} tokens each, on average", table)
    assert re.search(r"packed rows +\d+ +of 700 tokens, \d\d\.\d\d% full", table)
    assert re.search(r"samples +80 +from 80 examples of 1 file", table)


def test_marked_answers_say_which_they_are(weightless):
    encoder, samples, report = load(weightless, "marked")
    out = printed(lambda console: print_preferences(console, samples[:2], TokenReader(encoder)))
    titles = re.findall(r"^(Sample \d: \D+?)  ", out, re.MULTILINE)
    assert titles == [
        *("Sample 1: prompt", "Sample 1: good answer"),
        *("Sample 2: prompt", "Sample 2: bad answer"),
    ]
    table = printed(
        lambda console: print_figures(
            console, "Training data", report, count_preferences(samples, pack_to=200, seed=1)
        )
    )
    assert re.search(r"samples +160 +from 80 examples of 1 file", table)
    assert re.search(r"good answers +80 ", table) and re.search(r"bad answers +80 ", table)


def test_what_was_cut_and_duplicates_are_told(weightless):
    encoder, *_ = load(weightless, "pairs")
    ids = np.array([5, 6], np.int32)
    cut = PreferenceSample(
        ids, (ids, ids[:1]), margin=0.5, num_cut_prompt=3, num_cut_answer=2, num_dropped_rounds=1
    )
    out = printed(lambda console: print_preferences(console, [cut], TokenReader(encoder)))
    assert (
        "2 tokens; 3 tokens of the prompt cut; 1 old round left out; 2 tokens of the answers cut; margin 0.5"
        in out
    )
    other = PreferenceSample(ids[:1], (np.array([6, 5], np.int32), np.array([6, 5], np.int32)))
    assert count_preferences([cut, cut, other], pack_to=None, seed=0).num_duplicates == 1


def test_the_preview_of_a_run(preview, tmp_path):
    settings = {"dataset_name_or_path": str(FILE), "max_length": 900, "src_length": 100, "do_eval": False}
    code, out, err = preview(1, loss_type="sigmoid", **settings)
    assert code == 0, err
    assert [title in out for title in ("Pair 1: chosen", "Pair 1: rejected", "Pair 2")] == [True, True, False]
    assert re.search(r"samples +80 +from 80 examples of 1 file", out)
    code, out, err = preview(1, loss_type="kto", **settings)
    assert code == 0 and re.search(r"read by rule +80 +pairs read as a good and a bad answer", out), err
    (tmp_path / "faulty.json").write_text('{"prompt": "q", "chosen": "a"}\n')
    code, out, err = preview(1, loss_type="sigmoid", dataset_name_or_path=str(tmp_path / "faulty.json"))
    assert code == 2 and "faulty.json:1: nothing to compare an answer with" in err
    code, out, err = preview(1, **settings)
    assert code == 2 and "set loss_type to train on them" in err
