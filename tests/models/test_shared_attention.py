"""Answers that share a prompt on the kernels that a family's attention runs on with a GPU; see `test_attention`."""

import numpy as np
import paddle
import pytest

from finetune.data.batches.preference_rows import PreferenceRows, group_lengths
from finetune.data.packing.packing import pack
from finetune.data.preference.sample import PreferenceSample
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.families.family import get_family
from finetune.models.tiny.checkpoint import build_tiny
from finetune.training.loss import logits_of
from tests.families import decoding
from tests.families.cases import FACTS, small_options
from tests.models.test_attention import FAMILIES, Kernels

WINDOW = 4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return get_family(request.param)


@pytest.fixture(scope="module")
def folder(family, corpus, tmp_path_factory):
    options = {"vocab_size": 330, "num_layers": 2, "hidden_size": 32} | small_options(family.name)
    return build_tiny(family.name, tmp_path_factory.mktemp("shared") / family.name, corpus=corpus, **options)


@pytest.fixture
def kernels(monkeypatch):
    made = Kernels()
    monkeypatch.setattr(paddle.nn.functional, "flashmask_attention", made.flashmask_attention)
    monkeypatch.setattr(
        paddle.nn.functional, "scaled_dot_product_attention", made.scaled_dot_product_attention
    )
    return made


def make_samples(family):
    random = np.random.default_rng(4)
    made = [
        PreferenceSample(ids[0], (ids[1], ids[2]))
        for ids in (
            [random.integers(3, 300, size=size).astype(np.int32) for size in sizes]
            for sizes in ((5, 4, 6), (1, 3, 2))
        )
    ]
    if FACTS[family.name].sees_ahead:
        made[0].prompt_ids[-2:] = decoding.CONTEXT_END
    return made


def answer_logits(model, batch):
    """Of each answer, [tokens, vocabulary], by (sample, place)."""
    model.eval()
    with paddle.no_grad():
        found = logits_of(model(**batch.tensors())).numpy()[batch.labels != IGNORE_INDEX]
    return {
        (int(sample), place): found[batch.answer_of_label == number]
        for sample, group in zip(batch.sample_indices, batch.groups, strict=True)
        for place, number in enumerate(group)
    }


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("has_window", [False, True])
def test_shared_rows_equal_separate_ones_on_the_kernel_of_the_family(
    family, folder, kernels, is_packed, has_window
):
    if has_window and family.window_option is None:
        pytest.skip("this family sees all tokens")
    window = decoding.window_of(family, WINDOW) if has_window else {}
    plain, fused = (decoding.load_sharp(folder, use_flash_attention=on, **window) for on in (False, True))
    samples = make_samples(family)
    kind = family.packed_mask(window, fused=True, half=True, has_prefix=False, shares_prompts=True)
    packing = pack(group_lengths(samples), 40, seed=1) if is_packed else None
    separate = PreferenceRows(samples, pad_token_id=0, mask=None)
    expected = answer_logits(plain, separate.batch(np.arange(2)))
    rows = PreferenceRows(samples, pad_token_id=0, packing=packing, mask=kind)
    found = answer_logits(fused, rows.batch(np.arange(len(rows))))
    assert found.keys() == expected.keys() and len(found) == 4
    for answer, logits in expected.items():
        np.testing.assert_allclose(found[answer], logits, atol=1e-5 * max(1, np.abs(logits).max()))
    assert (len(kernels.flashmask), len(kernels.dense)) == ((2, 0) if kind == "start_end" else (0, 2))
    assert kind == "block" if has_window else kind is not None
