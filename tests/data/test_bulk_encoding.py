"""The fast way from conversations to samples against the plain one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import bulk_encoding
from finetune.data.bulk_encoding import BulkBuilder
from finetune.data.conversation import ASSISTANT, TEXT, TOOL, TOOL_CALL, USER, Conversation, Message
from finetune.data.formats import ReadOptions, read_conversations
from finetune.data.pieces import Piece
from finetune.data.template import load_template
from finetune.data.tokenize import TRAIN_ON, TRUNCATIONS, SampleBuilder, TooLongError, has_response
from tests.conftest import REAL_DATA
from tests.data.conftest import SPECIAL_IDS, CharacterEncoder


class BulkCharacterEncoder(CharacterEncoder):
    """The character tokenizer, for many texts."""

    def encode_many(self, texts):
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]


class MarkingEncoder(BulkCharacterEncoder):
    """Takes names of special tokens for these tokens in any text, as some tokenizers do."""

    def encode(self, text):
        return CharacterEncoder().encode_special(text)


def plain(conversations, builder, train_on):
    """What `SampleBuilder` makes of each conversation."""
    samples, dropped = [], []
    for conversation in conversations:
        try:
            sample = builder.sample(conversation)
        except TooLongError as error:
            dropped.append(str(error))
            continue
        if sample is None:
            dropped.append(has_response(conversation, only_last=train_on == "last"))
        else:
            samples.append(sample)
    return samples, dropped


def check_equal(conversations, encoder, template, **options):
    template = load_template(template) if isinstance(template, str | None) else template
    expected, expected_dropped = plain(
        conversations, SampleBuilder(encoder, template, **options), options["train_on"]
    )
    dropped: list[object] = []

    def note(conversation, error):
        only_last = options["train_on"] == "last"
        dropped.append(str(error) if error else has_response(conversation, only_last=only_last))

    store = BulkBuilder(encoder, template, **options).build(conversations, note)
    assert len(store) == len(expected)
    assert dropped == expected_dropped
    for sample, wanted in zip(store, expected, strict=True):
        assert sample.input_ids.dtype == wanted.input_ids.dtype == np.int32
        assert sample.input_ids.tolist() == wanted.input_ids.tolist()
        assert sample.labels.tolist() == wanted.labels.tolist()
        for name in ("num_label_tokens", "truncated_source", "truncated_target", "num_dropped_rounds"):
            assert getattr(sample, name) == getattr(wanted, name), name
    assert store.lengths.tolist() == [len(sample.input_ids) for sample in expected]
    assert store.num_label_tokens == sum(sample.num_label_tokens for sample in expected)


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
def test_samples_are_those_of_the_plain_builder(
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
def test_real_data(truncation, template, tiny_llama, monkeypatch):
    if not REAL_DATA.is_dir():
        pytest.skip("the real data are not here")
    from finetune.models.family import get_family
    from finetune.models.fast_encoder import load_fast_encoder

    monkeypatch.setattr(bulk_encoding, "CHUNK_CHARACTERS", 20_000)
    encoder, reason = load_fast_encoder(tiny_llama, get_family("llama"))
    assert encoder is not None, reason
    names = ("alpaca_zh_demo.json", "glaive_toolcall_zh_demo.json", "c4_demo.jsonl", "advertisegen/dev.json")
    options = ReadOptions(preference="chosen")
    conversations = [
        conversation
        for name in names
        for conversation in read_conversations([REAL_DATA / name], options)[:60]
    ]
    for train_on in TRAIN_ON:
        check_equal(
            conversations,
            encoder,
            template,
            src_length=200,
            max_length=600,
            truncation=truncation,
            train_on=train_on,
        )


def test_most_samples_take_the_fast_way(conversation, monkeypatch):
    """Otherwise the other tests would compare the plain builder with itself."""
    encoder = BulkCharacterEncoder()
    builder = BulkBuilder(encoder, load_template("llama2"), src_length=50, max_length=80)
    monkeypatch.setattr(builder._plain, "sample", None)
    conversations = [conversation(("ab", "c"), ("d", "ef")), conversation(("a", "b"), system="s")]
    store = builder.build(conversations, pytest.fail)
    assert len(store) == 2
    assert encoder.decode(store[1].input_ids) == "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b "


def test_a_text_is_not_encoded_twice(conversation):
    """What is too long goes to the plain builder with its ids."""
    encoder = BulkCharacterEncoder()
    builder = BulkBuilder(encoder, load_template(None), src_length=5, max_length=8)
    encoder.encode_many = lambda texts: [np.array([50] * len(text), dtype=np.int32) for text in texts]
    store = builder.build([conversation(("abcdefgh", "ijklmn"))], pytest.fail)
    assert store[0].input_ids.tolist() == [SPECIAL_IDS["<s>"], *[50] * 6]
    assert (store[0].truncated_source, store[0].truncated_target) == (True, True)
