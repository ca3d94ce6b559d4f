"""Samples made many at once, one by one, and token by token by the rules as they are written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.reading.conversation import ASSISTANT, TEXT, TOOL, TOOL_CALL, USER, Conversation, Message
from finetune.data.reading.formats import ReadOptions, read_conversations
from finetune.data.samples import bulk_encoding
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.tokenize import IGNORE_INDEX, TRAIN_ON, TRUNCATIONS, TooLongError
from finetune.data.templates.pieces import Piece
from finetune.data.templates.template import load_template
from tests.conftest import ROOT
from tests.data.conftest import SPECIAL_IDS, CharacterEncoder, build_sample
from tests.data.sample_rules import TOO_LONG, expect_sample


class BulkCharacterEncoder(CharacterEncoder):
    """The character tokenizer, for many texts."""

    def encode_many(self, texts):
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]


class MarkingEncoder(BulkCharacterEncoder):
    """Takes names of special tokens for these tokens in any text, as some tokenizers do."""

    def encode(self, text):
        return CharacterEncoder().encode_special(text)


def check_equal(conversations, encoder, template, **limits):
    """Many at once, one by one, and token by token by the rules."""
    template = load_template(template) if isinstance(template, str | None) else template
    expected, expected_dropped = [], []
    for conversation in conversations:
        sample = expect_sample(conversation, encoder, template, **limits)
        (expected_dropped if sample in (None, TOO_LONG) else expected).append(sample)
        check_single(sample, conversation, encoder, template, limits)
    dropped: list[object] = []
    builder = BulkBuilder(encoder, template, **limits)
    store = builder.build(conversations, lambda _, error: dropped.append(error and TOO_LONG))
    assert dropped == expected_dropped
    assert len(store) == len(expected)
    for sample, wanted in zip(store, expected, strict=True):
        check_sample(sample, *wanted)
    assert store.lengths.tolist() == [len(ids) - 1 for ids, *_ in expected]
    assert store.num_label_tokens == sum(sum(learned) for _, learned, *_ in expected)


def check_single(wanted, conversation, encoder, template, limits):
    try:
        sample = build_sample(conversation, encoder, template, **limits)
    except TooLongError:
        assert wanted == TOO_LONG
        return
    if wanted in (None, TOO_LONG):
        assert sample is None and wanted is None
    else:
        check_sample(sample, *wanted)


def check_sample(sample, ids, learned, cuts, num_dropped_rounds):
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert sample.input_ids.tolist() == ids[:-1]
    labels = [index if flag else IGNORE_INDEX for index, flag in zip(ids, learned, strict=True)]
    assert sample.labels.tolist() == labels[1:]
    assert sample.num_label_tokens == sum(learned)
    assert (sample.truncated_source, sample.truncated_target) == cuts
    assert sample.num_dropped_rounds == num_dropped_rounds


class TailTemplate:
    """Closes some answers by EOS itself, and writes on behind the last one."""

    appends_eos = True
    special_tokens = ("<sep>",)

    def render(self, conversation):
        pieces = []
        for number, turn in enumerate(conversation.turns):
            pieces += [Piece(turn.prompt, learned=False), Piece("<sep>", learned=False, special=True)]
            pieces.append(Piece(turn.response, learned=True))
            if number % 2 == 0:
                pieces.append(Piece("</s>", learned=True, special=True))
            pieces.append(Piece("tail", learned=False))
        return pieces


TEXTS = st.text(alphabet="ab <s>/\n上", max_size=12) | st.sampled_from(["<s>", "a<s>b", "x<sep>", "</s>"])
ROUND = st.builds(
    lambda prompt, answer, tool: (
        (Message(USER, prompt), Message(ASSISTANT, answer))
        if tool is None
        else (
            Message(USER, prompt),
            Message(TOOL_CALL, answer),
            Message(TOOL, tool),
            Message(ASSISTANT, answer),
        )
    ),
    TEXTS,
    TEXTS,
    st.none() | st.none() | TEXTS,
)
CONVERSATION = st.one_of(
    st.builds(lambda text: Conversation((Message(TEXT, text),)), TEXTS),
    st.builds(
        lambda rounds, system: Conversation(tuple(m for each in rounds for m in each), system),
        st.lists(ROUND, min_size=1, max_size=3),
        st.none() | TEXTS,
    ),
)


@settings(max_examples=300, deadline=None)
@given(
    conversations=st.lists(CONVERSATION, max_size=4),
    template=st.sampled_from([None, "llama2", "mistral", "alpaca", TailTemplate()]),
    truncation=st.sampled_from(TRUNCATIONS),
    train_on=st.sampled_from(TRAIN_ON),
    max_length=st.integers(2, 120),
    src_length=st.integers(1, 60),
    prefix=st.sampled_from([(), (1,), (1, 3)]),
    encoder=st.sampled_from([CharacterEncoder, BulkCharacterEncoder, MarkingEncoder]),
)
def test_samples_follow_the_rules(
    conversations, template, truncation, train_on, max_length, src_length, prefix, encoder
):
    check_equal(
        conversations,
        encoder(prefix_ids=prefix),
        template,
        src_length=src_length,
        max_length=max_length,
        truncation=truncation,
        train_on=train_on,
    )


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("template", [None, "llama2", "alpaca"])
def test_data_sets_of_other_shapes(truncation, template, data_sets, tiny_llama, monkeypatch):
    from finetune.families.family import get_family
    from finetune.tokenizers.fast_encoder import load_fast_encoder

    monkeypatch.setattr(bulk_encoding, "CHUNK_CHARACTERS", 20_000)
    encoder, reason = load_fast_encoder(tiny_llama, get_family("llama"))
    assert encoder is not None, reason
    options = ReadOptions(preference="chosen")
    files = [*data_sets.values(), ROOT / "data" / "dev.json"]
    conversations = [each for file in files for each in read_conversations([file], options)[:30]]
    lengths = {"src_length": 200, "max_length": 600}
    for train_on in TRAIN_ON:
        check_equal(conversations, encoder, template, **lengths, truncation=truncation, train_on=train_on)


@pytest.mark.parametrize("num_over", [-1, 0, 1])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("train_on", TRAIN_ON)
def test_at_the_limits(num_over, truncation, train_on, conversation):
    """Sources and samples of exactly the lengths allowed, and one token more and less."""
    source, answer = "s" * (9 + num_over), "a" * 5
    rounds = [[(source, answer)], [("q", "a"), (source, answer)], [(source, answer), ("q", "a")]]
    for src_length, max_length in ((10, 99), (99, 16), (10, 16)):
        check_equal(
            [conversation(*turns) for turns in rounds], BulkCharacterEncoder(), None,
            src_length=src_length, max_length=max_length, truncation=truncation, train_on=train_on,
        )  # fmt: skip


def test_a_text_is_not_encoded_twice(conversation):
    """Nor is one that has to be cut."""
    encoder = BulkCharacterEncoder()
    builder = BulkBuilder(encoder, load_template(None), src_length=5, max_length=8)
    encoder.encode_many = lambda texts: [np.array([50] * len(text), dtype=np.int32) for text in texts]
    store = builder.build([conversation(("abcdefgh", "ijklmn"))], pytest.fail)
    assert store[0].input_ids.tolist() == [SPECIAL_IDS["<s>"], *[50] * 6]
    assert (store[0].truncated_source, store[0].truncated_target) == (True, True)
