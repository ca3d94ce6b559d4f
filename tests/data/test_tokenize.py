import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.reading.conversation import Conversation, Message
from finetune.data.samples.tokenize import IGNORE_INDEX, SampleBuilder, TooLongError
from finetune.data.templates.template import JsonTemplate, Piece, PlainTemplate
from tests.data.conftest import build_sample

PLAIN = PlainTemplate()
TEXT = st.text(alphabet="abcdefgh西装", max_size=30)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5)
LENGTHS = st.integers(1, 60)
PREFIXES = st.sampled_from([(), (1,), (1, 3)])


def full_ids(sample):
    """The ids before the shift; the last one is a label, since a sample ends with what is learned."""
    assert sample.labels[-1] != IGNORE_INDEX
    return [*sample.input_ids.tolist(), int(sample.labels[-1])]


def show(encoder, sample):
    """The sample as text, its learned part in braces."""
    ids = full_ids(sample)
    text, was_learned = "", False
    for index, learned in zip(ids, [False, *(sample.labels != IGNORE_INDEX)], strict=True):
        text += "{" if learned and not was_learned else "}" if was_learned and not learned else ""
        text += encoder.decode([index])
        was_learned = bool(learned)
    return text + ("}" if was_learned else "")


@pytest.fixture(scope="session")
def render(encoder, conversation):
    def run(*turns, src_length=100, max_length=200, template=PLAIN, system=None):
        chat = conversation(*turns, system=system)
        sample = build_sample(chat, encoder, template, src_length=src_length, max_length=max_length)
        return sample and show(encoder, sample)

    return run


# --- one round ---


def test_shift_and_dtypes(encoder, conversation):
    sample = build_sample(conversation(("ab", "cd")), encoder, PLAIN, src_length=10, max_length=20)
    a, b, c, d = encoder.encode("abcd")
    assert sample.input_ids.tolist() == [1, a, b, c, d]
    assert sample.labels.tolist() == [-100, -100, c, d, 2]
    assert sample.input_ids.dtype == sample.labels.dtype == np.int32
    assert (sample.num_label_tokens, sample.truncated_source, sample.truncated_target) == (3, False, False)


@pytest.mark.parametrize(
    ("src_length", "max_length", "expected"),
    [
        (7, 13, "<s>source{target}"[:-1] + "}"),  # EOS is one token too many
        (7, 14, "<s>source{target</s>}"),
        (7, 10, "<s>source{tar}"),
        (4, 14, "<s>rce{target</s>}"),
        (4, 10, "<s>rce{target}"),
        (1, 14, "<s>{target</s>}"),
        (7, 8, "<s>source{t}"),
    ],
)
def test_truncation(render, src_length, max_length, expected):
    assert render(("source", "target"), src_length=src_length, max_length=max_length) == expected


@pytest.mark.parametrize(
    ("src_length", "max_length", "cuts"),
    [(7, 14, (False, False)), (6, 14, (True, False)), (7, 13, (False, True)), (2, 3, (True, True))],
)
def test_cuts_are_told(encoder, conversation, src_length, max_length, cuts):
    chat = conversation(("source", "target"))
    sample = build_sample(chat, encoder, PLAIN, src_length=src_length, max_length=max_length)
    assert (sample.truncated_source, sample.truncated_target) == cuts


@pytest.mark.parametrize("max_length", [1, 5, 7])
def test_no_room_gives_nothing(render, max_length):
    assert render(("source", "target"), src_length=7, max_length=max_length) is None


@pytest.mark.parametrize("response", ["", "  \n"])
def test_blank_response_gives_nothing(render, response):
    assert render(("source", response)) is None


def test_empty_prompt_is_allowed(render):
    assert render(("", "target")) == "<s>{target</s>}"


def test_first_token_of_all_cannot_be_learned(make_encoder, conversation):
    encoder = make_encoder(prefix_ids=())
    sample = build_sample(conversation(("", "ab")), encoder, PLAIN, src_length=5, max_length=9)
    assert sample.input_ids.tolist() == encoder.encode("ab")
    assert sample.labels.tolist() == [*encoder.encode("b"), 2]
    assert build_sample(conversation(("", "a")), encoder, PLAIN, src_length=5, max_length=9) is None


def test_prefix_longer_than_the_source_may_be_stays_whole(make_encoder, conversation):
    encoder = make_encoder(prefix_ids=(1, 3))
    sample = build_sample(conversation(("source", "t")), encoder, PLAIN, src_length=1, max_length=9)
    assert show(encoder, sample) == "<s><sep>{t</s>}"


def test_names_of_special_tokens_in_the_data_are_text(encoder, conversation):
    sample = build_sample(conversation(("<s>", "a</s>b")), encoder, PLAIN, src_length=50, max_length=99)
    assert [i for i in full_ids(sample) if i < 10] == [1, 2]


@given(prompt=TEXT, response=TEXT, src_length=LENGTHS, max_length=LENGTHS, prefix=PREFIXES)
def test_rules_of_one_round(make_encoder, conversation, prompt, response, src_length, max_length, prefix):
    encoder = make_encoder(prefix_ids=prefix)
    source, target = encoder.encode(prompt), encoder.encode(response)
    chat = conversation((prompt, response))
    sample = build_sample(chat, encoder, PLAIN, src_length=src_length, max_length=max_length)
    num_kept = min(len(source), max(src_length - len(prefix), 0))
    room = max_length - len(prefix) - num_kept
    if sample is None:
        can_be_predicted = prefix or num_kept or min(len(target), room) > 1
        assert not target or room < 1 or not can_be_predicted
        return
    ids = full_ids(sample)
    assert len(ids) <= max_length
    assert ids[: len(prefix)] == list(prefix)
    assert ids[len(prefix) : len(prefix) + num_kept] == source[len(source) - num_kept :]
    assert sample.truncated_source == (num_kept < len(source))
    rest = ids[len(prefix) + num_kept :]
    is_whole = len(target) + 1 <= room
    assert rest == ([*target, encoder.eos_token_id] if is_whole else target[:room])
    assert sample.truncated_target == (not is_whole)
    start = max(len(prefix) + num_kept - 1, 0)
    assert (sample.labels[:start] == IGNORE_INDEX).all()
    assert sample.labels[start:].tolist() == ids[start + 1 :]
    assert sample.num_label_tokens == len(ids) - start - 1 > 0


# --- several rounds ---


def test_every_response_is_learned_with_its_eos(render):
    assert render(("q1", "a1"), ("q2", "a2"), system="sys") == "<s>sysq1{a1</s>}q2{a2</s>}"


def test_whole_conversation_is_not_bound_by_src_length(render):
    assert render(("long question", "a"), ("q", "a"), src_length=3) == "<s>long question{a</s>}q{a</s>}"


def test_oldest_rounds_are_dropped_whole(encoder, conversation, render):
    turns = (("q1", "a1"), ("q2", "a2"), ("q3", "a3"))
    assert render(*turns, max_length=16) == "<s>q1{a1</s>}q2{a2</s>}q3{a3</s>}"
    assert render(*turns, max_length=15) == "<s>q2{a2</s>}q3{a3</s>}"
    assert render(*turns, max_length=10) == "<s>q3{a3</s>}"
    sample = build_sample(conversation(*turns), encoder, PLAIN, src_length=9, max_length=10)
    assert (sample.num_dropped_rounds, sample.truncated_source, sample.truncated_target) == (2, False, False)


def test_last_round_is_cut_like_a_single_one(render):
    assert render(("q1", "a1"), ("source", "target"), src_length=4, max_length=8) == "<s>rce{targ}"


def test_blank_last_response_with_the_others_dropped(render):
    assert render(("q1", "a1"), ("source", ""), max_length=8) is None


@given(turns=TURNS, src_length=LENGTHS, max_length=LENGTHS, prefix=PREFIXES)
def test_rules_of_several_rounds(make_encoder, conversation, turns, src_length, max_length, prefix):
    encoder = make_encoder(prefix_ids=prefix)
    chat = conversation(*turns)
    sample = build_sample(chat, encoder, PLAIN, src_length=src_length, max_length=max_length)
    if sample is None:
        return
    ids = full_ids(sample)
    learned = sample.labels != IGNORE_INDEX
    assert len(ids) <= max_length
    assert tuple(ids[: len(prefix)]) == prefix
    assert sample.labels[learned].tolist() == [i for i, keep in zip(ids[1:], learned, strict=True) if keep]
    assert sample.num_label_tokens == learned.sum()
    kept = turns[sample.num_dropped_rounds :]
    if len(kept) > 1:
        whole = [x for q, a in kept for x in [*encoder.encode(q), *encoder.encode(a), encoder.eos_token_id]]
        assert ids == [*prefix, *whole]
        assert not sample.truncated_source and not sample.truncated_target
    else:
        alone = build_sample(
            conversation(kept[0]), encoder, PLAIN, src_length=src_length, max_length=max_length
        )
        assert (ids, learned.tolist()) == (full_ids(alone), (alone.labels != IGNORE_INDEX).tolist())
    assert ids.count(encoder.eos_token_id) == len(kept) - sample.truncated_target


# --- with a template ---


CHAT = JsonTemplate(
    {"system": "<s>S", "conversation": ["Q{{user}}<sep>", "A{{bot}}</s>\n"], "query": "Q{{query}}<sep>"}, "t"
)


def test_template_writes_its_own_special_tokens(render, encoder, conversation):
    assert render(("q", "a"), template=CHAT) == "<s>SQq<sep>{Aa</s>\n}"
    sample = build_sample(conversation(("q", "a")), encoder, CHAT, src_length=50, max_length=99)
    assert [i for i in full_ids(sample) if i < 10] == [1, 3, 2]


def test_data_in_a_template_cannot_write_special_tokens(encoder, conversation):
    sample = build_sample(conversation(("<sep>", "a</s>b ")), encoder, CHAT, src_length=50, max_length=99)
    assert [i for i in full_ids(sample) if i < 10] == [1, 3, 2]
    assert show(encoder, sample) == "<s>SQ<sep><sep>{Aa</s>b </s>\n}"


def test_template_without_end_mark_gets_eos(render):
    template = JsonTemplate({"conversation": ["Q{{user}}", "A{{bot}}\n"]}, "t")
    assert render(("q", "a"), template=template) == "<s>Qq{Aa\n</s>}"


def test_eos_that_the_template_wrote_is_not_doubled(render):
    class Closed(PlainTemplate):
        mixes_text = True

        def render(self, conversation):
            return [Piece("q", learned=False), Piece("a</s>", learned=True, special=True)]

    assert render(("q", "a"), template=Closed()) == "<s>q{a</s>}"


def test_shortened_conversation_begins_as_the_template_begins(render):
    assert render(("q1", "a1"), ("q2", "a2"), template=CHAT, max_length=12) == "<s>SQq2<sep>{Aa2</s>\n}"


def test_cut_source_keeps_the_prefix_that_the_template_wrote(render):
    assert render(("question", "a"), template=CHAT, src_length=4) == "<s>on<sep>{Aa</s>\n}"


def test_text_after_the_last_learned_piece_is_left_out(render):
    class Tailed(PlainTemplate):
        def render(self, conversation):
            return [*super().render(conversation), Piece("tail", learned=False)]

    assert render(("q", "a"), template=Tailed()) == "<s>q{a</s>}"


# --- prompts ---


def test_prompt(encoder, conversation):
    prompt = SampleBuilder(encoder, PLAIN, src_length=50).prompt(conversation(("source", "target")))
    assert encoder.decode(prompt.input_ids) == "<s>source"
    assert prompt.input_ids.dtype == np.int32
    assert (prompt.source, prompt.target, prompt.truncated_source) == ("source", "target", False)


def test_prompt_is_cut_on_the_left(encoder, conversation):
    prompt = SampleBuilder(encoder, PLAIN, src_length=4).prompt(conversation(("source", "target")))
    assert (encoder.decode(prompt.input_ids), prompt.source, prompt.truncated_source) == (
        "<s>rce",
        "source",
        True,
    )


@pytest.mark.parametrize(("src_length", "expected"), [(8, "<s>q1a1</s>q2"), (7, "<s>q2"), (2, "<s>2")])
def test_prompt_of_several_rounds(encoder, conversation, src_length, expected):
    prompt = SampleBuilder(encoder, PLAIN, src_length=src_length).prompt(
        conversation(("q1", "a1"), ("q2", "a2"))
    )
    assert encoder.decode(prompt.input_ids) == expected
    assert prompt.source == "q1a1q2"
    assert prompt.num_dropped_rounds == ("q1" not in expected)


def test_prompt_behind_a_tool_call_is_cut_on_the_left(encoder):
    """The call is an answer of its own, and yet a part of what is shown."""
    roles = ["user", "tool_call", "tool", "assistant"]
    chat = Conversation(tuple(Message(role, str(i) * 3) for i, role in enumerate(roles)))
    for src_length, expected in ((11, "<s>000111</s>222"), (8, "<s>111</s>222"), (4, "<s>222")):
        prompt = SampleBuilder(encoder, PLAIN, src_length=src_length).prompt(chat)
        assert encoder.decode(prompt.input_ids) == expected
        assert prompt.truncated_source == (src_length < 11)


def test_prompt_of_a_template(encoder, conversation):
    prompt = SampleBuilder(encoder, CHAT, src_length=50).prompt(conversation(("q", "a")))
    assert prompt.input_ids.tolist() == [1, *encoder.encode("SQq"), 3]


def test_prompt_without_any_token(make_encoder, conversation):
    builder = SampleBuilder(make_encoder(prefix_ids=()), PLAIN, src_length=5)
    assert builder.prompt(conversation(("", "a"))) is None


@given(prompt=TEXT, response=TEXT.filter(bool), src_length=LENGTHS)
def test_generation_starts_where_training_did(encoder, conversation, prompt, response, src_length):
    chat = conversation((prompt, response))
    sample = build_sample(chat, encoder, PLAIN, src_length=src_length, max_length=200)
    start = SampleBuilder(encoder, PLAIN, src_length=src_length).prompt(chat).input_ids.tolist()
    assert full_ids(sample)[: len(start)] == start
    assert len(start) + sample.num_label_tokens == len(full_ids(sample))


# --- truncation, running text, what is learned ---


@pytest.fixture(scope="session")
def build(encoder, conversation):
    def run(*turns, src_length=4, max_length=8, template=PLAIN, **settings):
        limits = {"src_length": src_length, "max_length": max_length, **settings}
        sample = build_sample(conversation(*turns), encoder, template, **limits)
        return sample and show(encoder, sample)

    return run


@pytest.mark.parametrize(("truncation", "expected"), [("left", "<s>rce{targ}"), ("right", "<s>source{t}")])
def test_truncation_policies_that_cut(build, truncation, expected):
    assert build(("source", "target"), truncation=truncation) == expected
    assert build(("q1", "a1"), ("source", "target"), truncation=truncation) == expected


@pytest.mark.parametrize("truncation", ["drop", "error"])
@pytest.mark.parametrize("turns", [[("source", "target")], [("q", "a"), ("qq", "aa")]])
def test_truncation_policies_that_do_not_cut(build, truncation, turns):
    with pytest.raises(TooLongError, match=r"tokens, allowed are 8"):
        build(*turns, truncation=truncation)
    assert build(*turns, truncation=truncation, max_length=14, src_length=2).endswith("</s>}")


def test_right_truncation_that_leaves_no_answer(build):
    assert build(("source text", "t"), truncation="right") is None


def test_prompt_that_must_not_be_cut(encoder, conversation):
    builder = SampleBuilder(encoder, PLAIN, src_length=4, truncation="drop")
    with pytest.raises(TooLongError):
        builder.prompt(conversation(("source", "t")))
    assert len(builder.prompt(conversation(("src", "t"))).input_ids) == 4


def test_running_text_is_learned_from_its_first_token(encoder):
    text = Conversation((Message("text", "once upon"),))
    for template in (PLAIN, CHAT):
        whole = build_sample(text, encoder, template, src_length=2, max_length=50, train_on="last")
        assert show(encoder, whole) == "<s>{once upon</s>}"
        short = build_sample(text, encoder, template, src_length=2, max_length=5)
        assert show(encoder, short) == "<s>{once}" and short.truncated_target


def test_training_on_the_last_answer(build):
    turns = ("q1", "a1"), ("q2", "a2")
    assert build(*turns, max_length=99, train_on="last") == "<s>q1a1</s>q2{a2</s>}"
    assert (
        build(*turns, max_length=99, train_on="last", template=CHAT)
        == "<s>SQq1<sep>Aa1</s>\nQq2<sep>{Aa2</s>\n}"
    )
    assert build(("q1", "a1"), ("q2", " "), max_length=99, train_on="last") is None


def test_rounds_with_tools_are_dropped_whole(encoder):
    roles = ["user", "tool_call", "tool", "assistant", "user", "assistant"]
    conversation = Conversation(tuple(Message(role, str(i) * 2) for i, role in enumerate(roles)))
    for max_length, expected in ((17, "<s>00{11</s>}22{33</s>}44{55</s>}"), (15, "<s>44{55</s>}")):
        sample = build_sample(conversation, encoder, PLAIN, src_length=9, max_length=max_length)
        assert show(encoder, sample) == expected
    assert sample.num_dropped_rounds == 1
