"""NEFTune: the paper's scale, by the sample's own length, reproducible wherever it is computed."""

import math

import numpy as np
import paddle
import pytest

from finetune.machine.randomness.embedding_noise import EmbeddingNoise

ALPHA, HIDDEN = 5.0, 16


@pytest.fixture
def embedding():
    paddle.seed(0)
    return paddle.nn.Embedding(50, HIDDEN)


def noise_of(embedding, noise, ids, step, rows) -> np.ndarray:
    plain = embedding(ids).numpy()
    with noise.active(step, rows):
        return embedding(ids).numpy() - plain


def test_bound_per_position_follows_the_samples_own_length(embedding):
    noise = EmbeddingNoise(embedding, alpha=ALPHA, seed=1)
    lengths = [40, 7]
    found = noise_of(embedding, noise, paddle.ones([2, 40], "int64"), 0, [[(40, 0)], [(7, 1)]])
    for row, length in zip(found, lengths, strict=True):
        bound = ALPHA / math.sqrt(length * HIDDEN)
        largest = np.abs(row[:length]).max(axis=1)
        assert (largest <= bound * (1 + 1e-5)).all()
        assert np.abs(row[:length]).max() > 0.95 * bound  # the bound is reached, not just kept
        assert row[:length].std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert (row[length:] == 0).all()


def test_same_sample_and_step_get_the_same_noise_in_any_batch(embedding):
    noise = EmbeddingNoise(embedding, alpha=ALPHA, seed=1)
    pair = noise_of(embedding, noise, paddle.ones([2, 9], "int64"), 3, [[(9, 11)], [(6, 12)]])
    alone = noise_of(embedding, noise, paddle.ones([1, 6], "int64"), 3, [[(6, 12)]])
    np.testing.assert_array_equal(pair[1, :6], alone[0])


@pytest.mark.parametrize("key", [(4, 12), (3, 13)])
def test_other_steps_and_samples_get_other_noise(embedding, key):
    noise = EmbeddingNoise(embedding, alpha=ALPHA, seed=1)
    ids = paddle.ones([1, 6], "int64")
    first = noise_of(embedding, noise, ids, 3, [[(6, 12)]])
    step, sample = key
    assert np.abs(first - noise_of(embedding, noise, ids, step, [[(6, sample)]])).max() > 0.1


def test_packed_samples_get_the_noise_they_get_alone(embedding):
    noise = EmbeddingNoise(embedding, alpha=ALPHA, seed=1)
    packed = noise_of(embedding, noise, paddle.ones([1, 12], "int64"), 3, [[(4, 7), (6, 12)]])
    alone = noise_of(embedding, noise, paddle.ones([1, 6], "int64"), 3, [[(6, 12)]])
    np.testing.assert_array_equal(packed[0, 4:10], alone[0])
    assert (packed[0, 10:] == 0).all()


def test_no_noise_outside_the_block(embedding):
    EmbeddingNoise(embedding, alpha=ALPHA, seed=1)
    ids = paddle.ones([1, 6], "int64")
    np.testing.assert_array_equal(embedding(ids).numpy()[0], np.tile(embedding.weight.numpy()[1], (6, 1)))


def test_noise_leaves_paddles_own_random_numbers_alone(embedding):
    noise = EmbeddingNoise(embedding, alpha=ALPHA, seed=1)
    paddle.seed(4)
    expected = paddle.rand([5]).numpy()
    paddle.seed(4)
    noise_of(embedding, noise, paddle.ones([1, 6], "int64"), 3, [[(6, 12)]])
    np.testing.assert_array_equal(paddle.rand([5]).numpy(), expected)
