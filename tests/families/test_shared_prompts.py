"""Answers that share a prompt have the logits, losses and gradients of rows of their own, in every family."""

import dataclasses

import numpy as np
import paddle
import pytest

from finetune.data.batches.collate import block_mask
from finetune.data.batches.preference_rows import PreferenceRows, group_lengths
from finetune.data.packing.packing import pack
from finetune.data.preference.sample import PreferenceSample
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.models.tiny.checkpoint import build_tiny
from finetune.training.loss import logits_of
from tests.families import decoding
from tests.families.cases import FACTS

SIZES = [(5, 4, 6), (1, 3, 2), (7, 1, 5)]
"""Tokens of prompt, chosen and rejected; a prompt of one token has no trunk."""


@pytest.fixture(scope="module")
def folder(family, corpus, tmp_path_factory):
    return build_tiny(
        family.name, tmp_path_factory.mktemp("shared") / family.name,
        **{"corpus": corpus, "vocab_size": 330, "num_layers": 2, "hidden_size": 32} | FACTS[family.name].small,
    )  # fmt: skip


@pytest.fixture(params=["plain", "prefix"])
def tuned(request, folder, family):
    model = decoding.load_sharp(folder)
    return decoding.with_prefix(model, family) if request.param == "prefix" else model


@pytest.fixture
def samples(family):
    random = np.random.default_rng(3)
    made = [
        PreferenceSample(*(pick(random, sizes[0]), (pick(random, sizes[1]), pick(random, sizes[2]))))
        for sizes in SIZES
    ]
    if FACTS[family.name].sees_ahead:
        for sample in made[::2]:
            sample.prompt_ids[-2:] = decoding.CONTEXT_END
    return made


def pick(random, size):
    return random.integers(3, 300, size=size).astype(np.int32)


def answer_logits(model, batch):
    """Logits of each answer's labels, [labels, vocabulary], answer after answer."""
    with paddle.no_grad():
        found = logits_of(model(**batch.tensors())).numpy()[batch.labels != IGNORE_INDEX]
    return [found[batch.answer_of_label == number] for number in range(batch.num_answers)]


def rows_of(samples, kind, **options):
    packing = None
    if kind.startswith("packed"):
        packing = pack(group_lengths(samples), int(group_lengths(samples).sum()), seed=1)
    mask = None if kind == "separate" else "block"
    return PreferenceRows(samples, pad_token_id=0, packing=packing, mask=mask, **options)


@pytest.mark.parametrize("kind", ["shared", "packed"])
def test_logits_are_those_of_separate_rows(tuned, samples, kind):
    tuned.eval()
    expected = answer_logits(tuned, rows_of(samples, "separate").batch(np.arange(3)))
    rows = rows_of(samples, kind)
    batch = rows.batch(np.arange(len(rows)))
    found = answer_logits(tuned, batch)
    for place, sample in enumerate(batch.sample_indices):
        for number in range(2):
            np.testing.assert_allclose(
                found[batch.groups[place][number]], expected[2 * sample + number], atol=3e-5
            )


def test_gradients_are_those_of_separate_rows(tuned, samples):
    def gradients(batch):
        logits = logits_of(tuned(**batch.tensors())).flatten(0, 1)
        chosen = np.flatnonzero(batch.labels.ravel() != IGNORE_INDEX)
        labels = paddle.to_tensor(batch.labels.ravel()[chosen])
        losses = paddle.nn.functional.cross_entropy(
            logits[paddle.to_tensor(chosen)], labels, reduction="none"
        ).flatten()
        signs = np.array([1.0, -0.5] * 3, np.float32)[batch.answer_of_label]  # answers pull apart
        (losses * paddle.to_tensor(signs)).sum().backward()
        found = {n: p.grad.numpy() for n, p in tuned.named_parameters() if p.grad is not None}
        tuned.clear_gradients()
        return found

    expected = gradients(rows_of(samples, "separate").batch(np.arange(3)))
    found = gradients(rows_of(samples, "shared").batch(np.arange(3)))
    assert expected and found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = max(1, np.abs(expected[name]).max())
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=3e-5 * scale, err_msg=name)


def test_an_answer_does_not_see_the_other(tuned, samples):
    tuned.eval()
    changed = [dataclasses.replace(each, answers=(each.answers[0] + 1, each.answers[1])) for each in samples]
    before, after = (
        answer_logits(tuned, rows_of(part, "shared").batch(np.arange(3))) for part in (samples, changed)
    )
    for place in range(3):
        np.testing.assert_allclose(before[2 * place + 1], after[2 * place + 1], atol=1e-6)
    assert np.abs(before[0][1:] - after[0][1:]).max() > 1e-3


def test_a_window_counts_the_tokens_of_a_text(folder, family, samples):
    if family.window_option is None:
        pytest.skip("this family sees all tokens")
    model = decoding.load_sharp(folder, **decoding.window_of(family, 4))
    model.eval()
    expected = answer_logits(model, rows_of(samples, "separate").batch(np.arange(3)))
    for kind in ("shared", "packed"):
        rows = rows_of(samples, kind)
        batch = rows.batch(np.arange(len(rows)))
        found = answer_logits(model, batch)
        for place, sample in enumerate(batch.sample_indices):
            for number in range(2):
                np.testing.assert_allclose(
                    found[batch.groups[place][number]], expected[2 * sample + number], atol=3e-5
                )
    config = decoding.window_of(family, 4)
    options = {"fused": True, "half": True, "has_prefix": False}
    plain = "block" if FACTS[family.name].caps_scores else "start_end"  # which a kernel reads
    assert family.packed_mask(config, **options) == plain
    assert family.packed_mask(config, **options, shares_prompts=True) == "block"
    assert family.packed_mask({family.window_option: None}, **options, shares_prompts=True) == plain


def test_end_rows_say_what_the_dense_mask_says(samples):
    packing = pack(group_lengths(samples), int(group_lengths(samples).sum()), seed=1)
    dense, ends = (
        PreferenceRows(samples, pad_token_id=0, packing=packing, mask=mask, pad_to_multiple_of=16).batch(
            np.arange(1)
        )
        for mask in ("block", "start_end")
    )
    length = dense.shape[1]
    expected = block_mask(list(dense.mask_segments), length, dense.mask_trunks)[0, 0]
    rows = np.arange(length)[:, None]
    found = (rows >= rows.T) & (rows < ends.inputs["attn_mask_startend_row_indices"][0])
    np.testing.assert_array_equal(found, expected)
