"""The loss of a reward model: its definition, and however a batch is cut, packed and laid out."""

import numpy as np
import paddle
import pytest

from finetune.data.batches.preference_rows import group_lengths
from finetune.data.batches.reward_rows import RewardRows
from finetune.data.packing.packing import pack
from finetune.data.preference.sample import PreferenceSample
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.training.preference.losses import LossSettings
from finetune.training.preference.objective import Divisors
from finetune.training.preference.reward_objective import RewardObjective, reward_losses

VOCABULARY = 40
SIZES = [(5, 4, 6, 0.0), (3, 7, 2, 0.7), (7, 1, 5, -0.4), (4, 3, 3, 2.0)]
CHOSEN = np.array([-3.2, 0.4, 7.5, -22.0, 60.0])
REJECTED = np.array([-5.0, 1.6, -9.0, 31.0, 60.0])
MARGINS = np.array([0.0, 0.5, -1.0, 2.0, 0.0])


def expected(chosen, rejected, margins, center):
    return np.logaddexp(0, margins + rejected - chosen) + center * (chosen + rejected) ** 2


@pytest.mark.parametrize("center", [0.0, 0.05])
def test_the_loss_and_its_gradient_are_those_of_the_definition(center):
    tensors = [paddle.to_tensor(each, dtype="float32", stop_gradient=False) for each in (CHOSEN, REJECTED)]
    losses = reward_losses(*tensors, paddle.to_tensor(MARGINS, dtype="float32"), center=center)
    wanted = expected(CHOSEN, REJECTED, MARGINS, center)
    np.testing.assert_allclose(losses.numpy(), wanted, rtol=2e-6, atol=1e-6)
    losses.sum().backward()
    wrong = 1 / (1 + np.exp(CHOSEN - REJECTED - MARGINS))  # how far the model is from the preference
    centring = 2 * center * (CHOSEN + REJECTED)
    np.testing.assert_allclose(tensors[0].grad.numpy(), centring - wrong, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(tensors[1].grad.numpy(), centring + wrong, rtol=2e-5, atol=1e-6)


@pytest.fixture(scope="module")
def tables():
    """A model whose values depend on the token and its position alone: rows of any kind give the same."""
    random = np.random.default_rng(0)
    return [paddle.to_tensor(random.normal(0, 1, (size, 1)).astype(np.float32)) for size in (VOCABULARY, 32)]


@pytest.fixture(scope="module")
def samples():
    random = np.random.default_rng(1)
    draw = lambda size: random.integers(3, VOCABULARY, size=size).astype(np.int32)  # noqa: E731
    return [
        PreferenceSample(draw(prompt), (draw(chosen), draw(rejected)), margin=margin)
        for prompt, chosen, rejected, margin in SIZES
    ]


def make_rows(samples, kind):
    packing = None
    if kind == "packed":
        lengths = group_lengths(samples, reads_ends=True)
        packing = pack(lengths, int(lengths.max()) + 20, seed=1)
    return RewardRows(samples, pad_token_id=0, packing=packing, mask=None if kind == "separate" else "block")


def values_of(tables, batch):
    ids = batch.inputs["input_ids"]
    positions = batch.inputs.get("position_ids", np.tile(np.arange(ids.shape[1]), (len(ids), 1)))
    read = batch.labels != IGNORE_INDEX
    return tables[0].gather(paddle.to_tensor(ids[read])) + tables[1].gather(paddle.to_tensor(positions[read]))


@pytest.mark.parametrize("kind", ["separate", "shared", "packed"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_of_every_kind_give_the_values_at_the_last_tokens(tables, samples, kind, batch_size):
    rows = make_rows(samples, kind)
    if kind == "packed":
        assert len(rows) < len(samples), "nothing would be packed"
    objective = RewardObjective(LossSettings(loss_type="reward", center_rewards_coefficient=0.1))
    units = np.arange(len(rows))
    divisors = Divisors(rows.count_groups(units), 0)
    total, sums = 0.0, np.zeros(objective.num_sums)
    for start in range(0, len(rows), batch_size):
        batch = rows.batch(units[start : start + batch_size])
        assert (
            batch.num_label_tokens
            == 2 * len(batch.groups)
            == rows.count_label_tokens(units[start : start + batch_size])
        )
        share, figures = objective.share(batch, values_of(tables, batch), None, None, divisors=divisors)
        total, sums = total + float(share), sums + figures.numpy()
    token, place = (table.numpy()[:, 0] for table in tables)
    rewards = np.array(
        [
            [token[answer[-1]] + place[len(each.prompt_ids) + len(answer) - 1] for answer in each.answers]
            for each in samples
        ]
    )
    margins = np.array([each.margin for each in samples])
    assert total == pytest.approx(expected(*rewards.T, margins, 0.1).mean(), rel=1e-5)
    found = objective.metrics(list(sums), divisors.num_groups)
    assert found["rewards_chosen"] == pytest.approx(rewards[:, 0].mean(), rel=1e-5)
    assert found["rewards_margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-5)
    assert found["rewards_accuracy"] == (rewards[:, 0] > rewards[:, 1]).mean()


def test_rows_say_how_many_tokens_enter_the_model(samples):
    for kind in ("separate", "shared", "packed"):
        rows = make_rows(samples, kind)
        batch = rows.batch(np.arange(len(rows)))
        assert batch.num_tokens == rows.lengths.sum()
    assert make_rows(samples, "shared").lengths.tolist() == [sum(each[:3]) for each in SIZES]


def test_an_idle_batch_adds_nothing(tables, samples):
    rows = make_rows(samples, "shared")
    objective = RewardObjective(LossSettings(loss_type="reward"))
    batch = rows.batch(np.arange(2)).idle()
    share, sums = objective.share(batch, values_of(tables, batch), None, None, divisors=Divisors(2, 0))
    assert float(share) == 0 and not sums.numpy().any()
