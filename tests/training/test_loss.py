"""Token sums, against NumPy, and the gathered logits against the plain ones."""

import numpy as np
import paddle
import pytest

from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.training.loss import LabelPositions, token_loss_sum


def numpy_loss_sum(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    rows = labels.reshape(-1)
    kept = np.nonzero(rows != IGNORE_INDEX)[0]
    return -log_probabilities.reshape(-1, logits.shape[-1])[kept, rows[kept]].sum()


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 5, 11)).astype(np.float32) * 4
    labels = random.integers(0, 11, size=(3, 5))
    labels[0, :3] = labels[2, 4:] = IGNORE_INDEX
    return logits, labels


def test_sum_equals_numpy(batch):
    logits, labels = batch
    ours = token_loss_sum(paddle.to_tensor(logits), paddle.to_tensor(labels))
    assert float(ours) == pytest.approx(numpy_loss_sum(logits, labels), rel=1e-6)


def test_sum_over_parts_is_the_sum_over_all(batch):
    logits, labels = (paddle.to_tensor(array) for array in batch)
    parts = [float(token_loss_sum(logits[i], labels[i])) for i in range(3)]
    assert sum(parts) == pytest.approx(float(token_loss_sum(logits, labels)), rel=1e-6)


def test_gathered_logits_give_the_loss_and_gradients_of_all_logits(batch):
    _, label_array = batch
    labels = paddle.to_tensor(label_array)
    paddle.seed(1)
    head = paddle.nn.Linear(8, 11)
    hidden = paddle.randn([3, 5, 8])
    hidden.stop_gradient = False
    positions = LabelPositions(head)
    plain = token_loss_sum(head(hidden), labels)
    plain.backward()
    expected = [hidden.grad.numpy().copy(), head.weight.grad.numpy().copy()]
    hidden.clear_gradient()
    head.clear_gradients()

    with positions.only(label_array) as kept:
        logits = head(hidden)
        assert logits.shape == [11, 11]  # 15 positions, 4 of them without a label
        assert kept.dtype == paddle.int64
        assert kept.tolist() == label_array[label_array != IGNORE_INDEX].tolist()
        gathered = token_loss_sum(logits, kept)
    gathered.backward()
    assert float(gathered) == pytest.approx(float(plain), rel=1e-6)
    np.testing.assert_allclose(hidden.grad.numpy(), expected[0], atol=1e-6)
    np.testing.assert_allclose(head.weight.grad.numpy(), expected[1], atol=1e-5)
    assert head(hidden).shape == [3, 5, 11]  # outside the block nothing is gathered
