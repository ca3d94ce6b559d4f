"""The loss of a global batch: however it is cut and packed, and whatever rows it stands in."""

import dataclasses

import numpy as np
import paddle
import pytest

from finetune.data.batches.preference_rows import PreferenceRows, group_lengths
from finetune.data.packing.packing import pack
from finetune.data.preference.sample import PreferenceSample, find_partners
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.training.preference.losses import LossSettings
from finetune.training.preference.objective import SUMS, Divisors, PreferenceObjective

VOCABULARY = 40
SIZES = [(5, 4, 6), (3, 7, 2), (7, 1, 5), (4, 3, 3)]


@pytest.fixture(scope="module")
def weights():
    """A model whose logits depend on the token and its position alone: rows of any kind give the same."""
    random = np.random.default_rng(0)
    return [
        paddle.to_tensor(random.normal(0, 1, (size, VOCABULARY)).astype(np.float32))
        for size in (VOCABULARY, 32)
    ]


def make_samples(marked: bool) -> list[PreferenceSample]:
    random = np.random.default_rng(1)
    draw = lambda size: random.integers(3, VOCABULARY, size=size).astype(np.int32)  # noqa: E731
    found = []
    for number, (prompt, chosen, rejected) in enumerate(SIZES):
        answers = (draw(chosen),) if marked else (draw(chosen), draw(rejected))
        found.append(PreferenceSample(draw(prompt), answers, desirable=number % 2 == 0 if marked else None))
    return found


def make_rows(samples, settings, kind):
    partners = find_partners(samples) if settings.loss_type == "kto" else None
    packing = None
    if kind == "packed":
        lengths = group_lengths(samples, partners=partners)
        packing = pack(lengths, int(lengths.max()) + 12, seed=1)
    return PreferenceRows(
        samples,
        pad_token_id=0,
        packing=packing,
        mask=None if kind == "separate" else "block",
        partners=partners,
        learns_prompts=settings.learns_prompts,
    )


def logits_and_labels(weights, batch):
    ids = batch.inputs["input_ids"]
    positions = batch.inputs.get("position_ids", np.tile(np.arange(ids.shape[1]), (len(ids), 1)))
    learned = batch.labels != IGNORE_INDEX
    logits = weights[0].gather(paddle.to_tensor(ids[learned])) + weights[1].gather(
        paddle.to_tensor(positions[learned])
    )
    return logits, paddle.to_tensor(batch.labels[learned])


def step(weights, samples, settings, *, kind, batch_size):
    """Loss, gradient and metrics of one global batch in micro-batches."""
    tuned = [paddle.to_tensor(each.numpy(), stop_gradient=False) for each in weights]
    rows = make_rows(samples, settings, kind)
    width = 1 if settings.loss_type == "kto" else 2
    reference = np.random.default_rng(2).normal(-12, 3, (len(samples), 2)).astype(np.float32)
    objective = PreferenceObjective(settings, reference if settings.uses_reference else None)
    units = np.arange(len(rows))
    parts = [rows.batch(units[start : start + batch_size]) for start in range(0, len(units), batch_size)]
    parts.append(parts[0].idle())
    divisors = Divisors(rows.count_groups(units), rows.count_learned_tokens(units))
    divergences = None
    if settings.estimates_divergence:
        sums = sum(objective.estimate(part, *logits_and_labels(tuned, part), None) for part in parts)
        divergences = objective.divergences(sums, divisors.num_groups)
    total, figures = 0.0, np.zeros(len(SUMS))
    for part in parts:
        share, sums = objective.share(
            part, *logits_and_labels(tuned, part), None, divisors=divisors, divergences=divergences
        )
        share.backward()
        total += float(share)
        figures += sums.numpy()
    assert width and divisors.num_groups == len(samples)
    return total, [each.grad.numpy() for each in tuned], objective.metrics(figures.tolist(), len(samples))


LOSSES = [
    LossSettings(loss_type="sigmoid"),
    LossSettings(loss_type="ipo"),
    LossSettings(loss_type="kto_pair", beta=0.5),
    LossSettings(loss_type="sigmoid", sft_loss_ratio=0.3, pref_loss_ratio=0.5),
    LossSettings(loss_type="orpo", sft_loss_ratio=1.0),
    LossSettings(loss_type="cpo", sft_loss_ratio=1.0),
    LossSettings(loss_type="kto", beta=0.5),
]


@pytest.mark.parametrize("settings", LOSSES, ids=lambda each: f"{each.loss_type}-{each.sft_loss_ratio}")
@pytest.mark.parametrize("kind", ["shared", "separate", "packed"])
def test_every_way_of_cutting_gives_one_loss_and_one_gradient(weights, settings, kind):
    samples = make_samples(settings.loss_type == "kto")
    loss, gradients, metrics = step(weights, samples, settings, kind="shared", batch_size=4)
    assert np.isfinite(loss) and any(np.abs(each).max() > 1e-4 for each in gradients)
    for batch_size in (1, 2):
        found = step(weights, samples, settings, kind=kind, batch_size=batch_size)
        assert found[0] == pytest.approx(loss, rel=1e-5)
        for mine, theirs in zip(found[1], gradients, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
        assert found[2] == pytest.approx(metrics, rel=1e-5)


def test_the_likelihood_of_orpo_counts_prompts_and_that_of_others_does_not(weights):
    samples = make_samples(False)
    for loss_type, counts_prompts in (("orpo", True), ("cpo", False)):
        settings = LossSettings(loss_type=loss_type, sft_loss_ratio=1.0, pref_loss_ratio=0.0)
        found, _, _ = step(weights, samples, settings, kind="shared", batch_size=2)
        total, count = 0.0, 0
        for sample in samples:
            ids = np.concatenate([sample.prompt_ids, sample.answers[0]])
            first = 1 if counts_prompts else len(sample.prompt_ids)
            for place in range(first, len(ids)):
                scores = weights[0].numpy()[ids[place - 1]] + weights[1].numpy()[place - 1]
                total += np.log(np.exp(scores).sum()) - scores[ids[place]]
                count += 1
        assert found == pytest.approx(total / count, rel=1e-5)


def test_metrics_name_only_what_there_is():
    objective = PreferenceObjective(LossSettings(loss_type="kto"))
    named = dict.fromkeys(SUMS, 0.0) | {"chosen": 3.0, "num_chosen": 2.0, "num_right": 1.0, "divergence": 0.4}
    found = objective.metrics([named[name] for name in SUMS], 2)
    assert found == {
        "rewards_chosen": 1.5,
        "logps_chosen": 0.0,
        "rewards_accuracy": 0.5,
        "divergence": 0.2,
    }


def test_an_idle_batch_counts_nothing(weights):
    samples = make_samples(False)
    settings = LossSettings(loss_type="sigmoid")
    part = make_rows(samples, settings, "shared").batch(np.arange(2)).idle()
    objective = PreferenceObjective(settings, np.zeros((4, 2), np.float32))
    share, sums = objective.share(part, *logits_and_labels(weights, part), None, divisors=Divisors(4, 9))
    assert float(share) == 0 and not sums.numpy().any() and dataclasses.replace(part).num_groups == 0
