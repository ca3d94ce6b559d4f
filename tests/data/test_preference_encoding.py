"""Prompts and answers as ids: those of supervised training, cut by rules that are counted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.preference.dataset import load_preferences
from finetune.data.preference.encoding import share_room
from finetune.data.preference.sample import PreferenceSample, find_partners, hash_preferences
from finetune.data.preference.store import PreferenceStore
from finetune.data.reading.conversation import ASSISTANT, Comparison, Message, make_conversation
from finetune.data.reading.records import FaultCollector
from finetune.data.templates.pieces import Piece
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from tests.data.conftest import build_sample

LONG = {"src_length": 500, "max_length": 1000}


def compare(*turns, rejected="no", system=None, margin=0.0):
    conversation = make_conversation(turns, system, Path("train.json"), 7)
    return replace(conversation, comparison=Comparison(Message(ASSISTANT, rejected), margin=margin))


def load(conversations, encoder, template=None, **limits):
    return load_preferences(conversations, encoder, load_template(template), **(LONG | limits))


def texts(sample, encoder):
    return [encoder.decode(ids) for ids in (sample.prompt_ids, *sample.answers)]


@pytest.mark.parametrize("name", [None, "plain", "alpaca", "vicuna", "chatglm2"])
@pytest.mark.parametrize(
    "turns", [[("q", "yes")], [("p", "o"), ("", "other"), ("q", " yes ")], [("p", " "), ("q", "yes")]]
)
@pytest.mark.parametrize("system", [None, "be kind"])
def test_each_answer_is_what_supervised_training_learns(encoder, name, turns, system):
    pair = compare(*turns, rejected="no, never", system=system)
    (sample,), _ = load([pair], encoder, name)
    template = load_template(name)
    for answer, ids in zip((turns[-1][1], "no, never"), sample.answers, strict=True):
        single = replace(pair, comparison=None, messages=(*pair.messages[:-1], Message(ASSISTANT, answer)))
        expected = build_sample(single, encoder, template, **LONG, train_on="last")
        tokens = [*expected.input_ids.tolist(), int(expected.labels[-1])]
        assert [*sample.prompt_ids.tolist(), *ids.tolist()] == tokens
        assert expected.num_label_tokens == len(ids)
    assert (sample.desirable, sample.num_cut_prompt, sample.num_cut_answer) == (None, 0, 0)


def test_what_is_cut_and_how_it_is_counted(encoder):
    pair = compare(("abcdefgh", "ABCDEFG"), rejected="12")
    # <s> and 8 tokens of the prompt, 7 + 1 and 2 + 1 of the answers: 8 + 8 + 3 = 19
    (sample,), report = load([pair], encoder, max_length=19, src_length=2)
    assert texts(sample, encoder) == ["<s>abcdefgh", "ABCDEFG</s>", "12</s>"] and sample.num_tokens == 19
    assert (report.num_truncated_source, report.num_truncated_target) == (0, 0)
    (sample,), report = load([pair], encoder, max_length=18, src_length=5)
    assert texts(sample, encoder) == ["<s>efgh", "ABCDEFG</s>", "12</s>"]
    assert sample.num_cut_prompt == 4 and (report.num_truncated_source, report.num_truncated_target) == (1, 0)
    (sample,), report = load([pair], encoder, max_length=12, src_length=5)
    assert texts(sample, encoder) == ["<s>efgh", "ABCDE", "12</s>"]
    assert sample.num_cut_answer == 3 and (report.num_truncated_source, report.num_truncated_target) == (1, 1)
    (sample,), _ = load([pair], encoder, max_length=13, truncation="right")
    assert texts(sample, encoder) == ["<s>abcdefgh", "ABC", "12"] and sample.num_cut_prompt == 0
    assert "truncated: 1 sources, 1 targets" in report.describe().replace("1 source,", "1 sources,").replace(
        "1 target", "1 targets"
    )


def test_oldest_rounds_go_first(encoder):
    pair = compare(("aaaa", "bbbb"), ("cc", "dd"), rejected="e")
    (sample,), report = load([pair], encoder, max_length=12)
    assert texts(sample, encoder) == ["<s>cc", "dd</s>", "e</s>"]
    assert sample.num_dropped_rounds == report.num_dropped_rounds == 1 and not report.num_truncated_source


@pytest.mark.parametrize(
    ("pair", "limits", "reason"),
    [
        (compare(("q", " ")), {}, "empty answer"),
        (compare(("q", "a"), rejected="\n"), {}, "empty answer"),
        (compare(("abcdef", "a"), rejected="b"), {"src_length": 9, "max_length": 7}, "no token of an answer"),
        (compare(("q", "same1"), rejected="same2"), {"max_length": 9}, "answers equal within the length"),
        (compare(("q", "a"), rejected="long"), {"truncation": "drop", "max_length": 5}, "too long"),
    ],
)  # fmt: skip
def test_what_is_dropped_is_counted(encoder, pair, limits, reason):
    kept = replace(compare(("q", "y"), rejected="n"), line_number=8)
    samples, report = load([pair, kept], encoder, **limits)
    assert len(samples) == 1 and [*report.num_dropped.values()] == [1]
    assert reason in next(iter(report.num_dropped))
    with pytest.raises(UserError, match=rf"none of the 1 examples can be used .*{reason}"):
        load([pair], encoder, **limits)


def test_too_long_ones_are_told_with_their_place(encoder):
    with pytest.raises(UserError, match=r"train\.json:7: 8 tokens, allowed are 5"):
        load([compare(("q", "a"), rejected="long")], encoder, truncation="error", max_length=5)


def test_a_prompt_without_a_token(make_encoder):
    with pytest.raises(UserError, match="empty prompt"):
        load([compare(("", "a"))], make_encoder(prefix_ids=()))


class CountingTemplate:
    """Says in front how long the answer will be."""

    appends_eos, special_tokens = True, ()

    def render(self, conversation):
        answer = conversation.messages[-1].content
        return [Piece(f"{len(answer)}:", learned=False), Piece(answer, learned=True)]


def test_a_template_that_writes_the_prompt_by_the_answer(encoder):
    pair, same = compare(("q", "yes")), compare(("q", "no"), rejected="ok")
    faults = FaultCollector(skip=True)
    samples, _ = load_preferences([pair, same], encoder, CountingTemplate(), **LONG, faults=faults)
    assert len(samples) == 1 and faults.num_faults == 1
    with pytest.raises(UserError, match=r"train\.json:7: the chat template writes the prompt otherwise"):
        load_preferences([pair, same], encoder, CountingTemplate(), **LONG)


def test_system_text_margin_and_marks_are_kept(encoder):
    marked = replace(compare(("q", "a")), comparison=Comparison(desirable=False))
    samples, _ = load([marked], encoder, "vicuna", system="be kind")
    assert samples[0].desirable is False and len(samples[0].answers) == 1
    assert "be kind" in encoder.decode(samples[0].prompt_ids)
    (sample,), _ = load([compare(("q", "a"), margin=0.25)], encoder)
    assert sample.margin == 0.25


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), room=st.integers(0, 60))
def test_the_longest_answer_is_cut_first(lengths, room):
    answers = [np.arange(length, dtype=np.int32) for length in lengths]
    kept = [len(part) for part in share_room(answers, room)]
    assert sum(kept) == min(sum(lengths), room)
    for own, length in zip(kept, lengths, strict=True):
        assert own == length or own >= max(kept) - 1  # who was cut is as long as the longest


def test_a_store_gives_its_samples_back():
    samples = [
        PreferenceSample(np.array([1, 5], np.int32), (np.array([7], np.int32), np.array([8, 2], np.int32)), None, 0.5),
        PreferenceSample(
            np.array([1], np.int32), (np.array([9, 2], np.int32), np.array([4], np.int32)),
            num_cut_prompt=3, num_cut_answer=2, num_dropped_rounds=1,
        ),
    ]  # fmt: skip
    store = PreferenceStore.of(samples)
    again = PreferenceStore(store.arrays)
    assert all(array.ndim == 1 for array in store.arrays.values()) and len(again) == 2
    for sample, found in zip(samples, again, strict=True):
        assert [ids.tolist() for ids in (found.prompt_ids, *found.answers)] == [
            ids.tolist() for ids in (sample.prompt_ids, *sample.answers)
        ]
        for name in ("desirable", "margin", "num_cut_prompt", "num_cut_answer", "num_dropped_rounds"):
            assert getattr(found, name) == getattr(sample, name)
    assert again[-1].num_cut_prompt == 3 and len(again[:1]) == 1
    assert hash_preferences(samples) == hash_preferences(again) != hash_preferences(samples[::-1])
    marked = PreferenceStore.of([replace(samples[0], answers=samples[0].answers[:1], desirable=False)])
    assert marked[0].desirable is False and len(marked[0].answers) == 1


def test_partners_have_other_prompts():
    def of(*prompts):
        return [
            PreferenceSample(np.array([prompt], np.int32), (np.array([2], np.int32),), True)
            for prompt in prompts
        ]

    assert find_partners(of(1, 2, 3)).tolist() == [
        2,
        0,
        1,
    ]  # the batch shifted by one, where all prompts differ
    assert find_partners(of(1, 1, 2, 2, 1)).tolist() == [3, 3, 1, 1, 3]
    assert find_partners(of(5, 5, 5)).tolist() == [2, 0, 1]
    assert find_partners(of(5)).tolist() == [0]
