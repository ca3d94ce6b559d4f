"""Sampling against a count of every draw, in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

NUM_DRAWS = 4000


def chosen(logits: np.ndarray, *, top_k: int, top_p: float, temperature: float) -> np.ndarray:
    """Tokens for evenly spread draws."""
    import paddle

    from finetune.serving.decoding.token_choice import Choice, choose_tokens

    draws = ((np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS).astype(np.float32)
    choice = Choice(
        paddle.to_tensor([top_k, 0, 0, 0]),
        paddle.to_tensor([temperature, top_p, 1.0]),
        paddle.to_tensor([-1]),
        paddle.to_tensor(draws[:, None]),
    )
    rows = paddle.to_tensor(np.tile(logits, (NUM_DRAWS, 1)))
    return choose_tokens(rows, paddle.full([], 0, "int64"), choice).numpy()[:, 0]


def kept_probabilities(logits: np.ndarray, *, top_k: int, top_p: float, temperature: float) -> np.ndarray:
    """What the settings leave of the distribution."""
    scores = np.exp(logits.astype(np.float64) / temperature)
    probabilities = scores / scores.sum()
    order = np.argsort(-probabilities)
    kept = np.zeros(len(logits), bool)
    mass = 0.0
    for rank, token in enumerate(order):
        if (top_k and rank >= top_k) or mass > top_p:
            break
        kept[token] = True
        mass += probabilities[token]
    return np.where(kept, probabilities, 0.0) / probabilities[kept].sum()


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [(0, 2.0, 1.0), (5, 2.0, 1.0), (0, 0.7, 1.0), (8, 0.6, 0.5), (3, 0.99, 2.0), (500, 2.0, 1.0)],
)
def test_every_token_comes_as_often_as_it_should(top_k, top_p, temperature):
    logits = np.random.default_rng(0).normal(size=40).astype(np.float32) * 2
    settings = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    counts = np.bincount(chosen(logits, **settings), minlength=40) / NUM_DRAWS
    np.testing.assert_allclose(counts, kept_probabilities(logits, **settings), atol=2 / NUM_DRAWS)


def test_the_last_draw_never_leaves_what_is_kept():
    logits = np.array([3.0, 2.0, 1.0, -50.0], np.float32)
    assert set(chosen(logits, top_k=2, top_p=2.0, temperature=1.0)) == {0, 1}


def test_greedy_ignores_the_draws():
    logits = np.array([0.1, 0.3, 0.2], np.float32)
    assert set(chosen(logits, top_k=1, top_p=2.0, temperature=1.0)) == {1}


@pytest.mark.parametrize(("top_p", "kept"), [(0.49, {0}), (0.5, {0, 1}), (0.74, {0, 1}), (0.76, {0, 1, 2})])
def test_a_token_is_kept_while_what_stands_before_it_is_no_more_than_top_p(top_p, kept):
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1])).astype(np.float32)
    assert set(chosen(logits, top_k=0, top_p=top_p, temperature=1.0)) == kept


@pytest.mark.parametrize(("step", "token"), [(0, 1), (1, 1), (2, 0)])
def test_stop_ids_are_out_until_the_least_number_of_tokens_is_made(step, token):
    import paddle

    from finetune.serving.decoding.token_choice import Choice, choose_tokens, forbid_tokens

    choice = Choice(
        paddle.to_tensor([1, 2, 0, 0]),  # two tokens before which a row may not end
        paddle.to_tensor([1.0, 2.0, 1.0]),
        paddle.to_tensor([0]),
        paddle.zeros([1, 3]),
    )
    logits = forbid_tokens(paddle.to_tensor([[3.0, 2.0, 1.0]]), paddle.full([], step, "int64"), choice)
    assert choose_tokens(logits, paddle.full([], step, "int64"), choice).tolist() == [[token]]
