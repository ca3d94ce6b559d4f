"""DPO in every family: loss and gradients of shared and packed rows are those of its definition over single texts.

The definition (Rafailov et al., "Direct Preference Optimization", 2023) is worked out in NumPy in float64, from the
logits of each answer behind its prompt in a row of its own; its gradient is the sum of the answers' own gradients, each
times the derivative of the loss by its log-probability.
"""

import numpy as np
import paddle
import pytest

from finetune.data.batches.preference_rows import PreferenceRows, group_lengths
from finetune.data.packing.packing import pack
from finetune.data.preference.sample import PreferenceSample
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.models.tiny.checkpoint import build_tiny
from finetune.training.loss import logits_of
from finetune.training.preference.losses import LossSettings
from finetune.training.preference.objective import Divisors, PreferenceObjective
from tests.families import decoding
from tests.families.cases import FACTS

SIZES = [(5, 4, 6), (1, 3, 2), (7, 1, 5)]
"""Tokens of prompt, chosen and rejected."""
BETA = 0.2


@pytest.fixture(scope="module")
def folder(family, corpus, tmp_path_factory):
    return build_tiny(
        family.name, tmp_path_factory.mktemp("preferences") / family.name,
        **{"corpus": corpus, "vocab_size": 330, "num_layers": 2, "hidden_size": 32} | FACTS[family.name].small,
    )  # fmt: skip


@pytest.fixture(params=["all weights", "lora"])
def tuned(request, folder, family):
    model = decoding.load_sharp(folder)
    return model if request.param == "all weights" else decoding.with_moved_lora(model, family)


@pytest.fixture(scope="module")
def samples():
    random = np.random.default_rng(3)
    rows = [[random.integers(3, 300, size=size).astype(np.int32) for size in sizes] for sizes in SIZES]
    return [PreferenceSample(prompt, (chosen, rejected)) for prompt, chosen, rejected in rows]


def gradients_of(model) -> dict[str, np.ndarray]:
    found = {name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None}
    model.clear_gradients()
    return found


def answer_of(model, prompt, answer) -> tuple[float, dict[str, np.ndarray]]:
    """Log-probability of an answer behind its prompt, in float64, and its gradient."""
    ids = np.concatenate([prompt, answer])[None, :-1].astype(np.int64)
    logits = logits_of(model(input_ids=paddle.to_tensor(ids)))[0, len(prompt) - 1 :]
    taken = logits.numpy().astype(np.float64)
    highest = taken.max(axis=1, keepdims=True)
    normed = taken - highest - np.log(np.exp(taken - highest).sum(axis=1, keepdims=True))
    labels = paddle.to_tensor(answer.astype(np.int64))
    (-paddle.nn.functional.cross_entropy(logits, labels, reduction="sum")).backward()
    return float(normed[np.arange(len(answer)), answer].sum()), gradients_of(model)


def expected_step(model, samples, reference) -> tuple[float, dict[str, np.ndarray]]:
    """Mean over the pairs of -log sigmoid(beta x (difference of log ratios)), and its gradient."""
    total, gradients = 0.0, {}
    for sample, base in zip(samples, reference.astype(np.float64), strict=True):
        answers = [answer_of(model, sample.prompt_ids, each) for each in sample.answers]
        margin = BETA * (answers[0][0] - base[0] - answers[1][0] + base[1])
        total += np.log1p(np.exp(-margin)) / len(samples)
        slope = -BETA / (1 + np.exp(margin)) / len(samples)
        for (_, gradient), sign in zip(answers, (1, -1), strict=True):
            for name, each in gradient.items():
                gradients[name] = gradients.get(name, 0) + sign * slope * each.astype(np.float64)
    return float(total), gradients


def found_step(model, samples, reference, kind: str) -> tuple[float, dict[str, np.ndarray]]:
    """What a training step computes of the pairs in one batch."""
    packing = (
        pack(group_lengths(samples), int(group_lengths(samples).sum()), seed=1) if kind == "packed" else None
    )
    mask = None if kind == "separate" else "block"
    rows = PreferenceRows(samples, pad_token_id=0, packing=packing, mask=mask)
    batch = rows.batch(np.arange(len(rows)))
    objective = PreferenceObjective(LossSettings(loss_type="sigmoid", beta=BETA), reference)
    learned = np.flatnonzero(batch.labels.ravel() != IGNORE_INDEX)
    logits = logits_of(model(**batch.tensors())).flatten(0, 1).gather(paddle.to_tensor(learned))
    labels = paddle.to_tensor(batch.labels.ravel()[learned].astype(np.int64))
    loss, _ = objective.share(batch, logits, labels, None, divisors=Divisors(len(samples), len(learned)))
    loss.backward()
    return float(loss), gradients_of(model)


def test_a_step_is_that_of_the_definition(tuned, samples):
    tuned.eval()
    # Far from the policy on either side, so that no pair has the slope of another.
    reference = np.array([[-20.0, -31.0], [-15.0, -9.0], [-6.0, -28.0]], np.float32)
    loss, gradients = expected_step(tuned, samples, reference)
    assert gradients and max(np.abs(each).max() for each in gradients.values()) > 1e-3
    for kind in ("separate", "shared", "packed"):
        found = found_step(tuned, samples, reference, kind)
        assert found[0] == pytest.approx(loss, rel=1e-5, abs=1e-6), kind
        assert found[1].keys() == gradients.keys()
        for name, gradient in found[1].items():
            scale = max(0.1, np.abs(gradients[name]).max())
            np.testing.assert_allclose(
                gradient, gradients[name], rtol=0, atol=3e-5 * scale, err_msg=f"{kind}: {name}"
            )
