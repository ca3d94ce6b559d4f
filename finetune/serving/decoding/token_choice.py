"""From logits to the next tokens, in operations that stand in a static graph and run outside of one too.

The order is that of PaddleNLP's `generate`: repetition penalty (Keskar et al. 2019), no end before the
least number of tokens, temperature, the k most probable tokens, then the smallest set of them that holds
top_p of the probability (Holtzman et al. 2020). Which token of what is left is taken is decided by a number
from outside, so that a sample depends neither on the batch it is in nor on the library's random state.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle.static.nn import cond

_NEVER = -3.0e38


class Choice:
    """The settings of a run, as tensors.

    Args:
        counts: top_k, tokens before which a row may not end, id that fills finished rows, prefix columns.
        factors: Temperature, top_p, repetition penalty.
        stop_ids: [K].
        draws: [B, N].
    """

    def __init__(self, counts: Any, factors: Any, stop_ids: Any, draws: Any):
        self.top_k, self.min_tokens, self.filler, self.num_prefix = (counts[place] for place in range(4))
        self.temperature, self.top_p, self.penalty = (factors[place] for place in range(3))
        self.stop_ids = stop_ids
        self.draws = draws
        self.is_greedy = self.top_k == 1
        self.penalises = self.penalty != 1.0


def penalise_repetition(logits: Any, history: Any, choice: Choice) -> Any:
    """Lowers the logits [B, vocabulary] of tokens that stand in the history [B, H]."""

    def lowered() -> Any:
        found = paddle.take_along_axis(logits, history, axis=1)
        found = paddle.where(found < 0, found * choice.penalty, found / choice.penalty)
        return paddle.put_along_axis(logits, history, found, axis=1)

    return cond(choice.penalises, lowered, lambda: logits)


def forbid_tokens(logits: Any, step: Any, choice: Choice) -> Any:
    """Takes the stop ids out while a row is too short to end."""

    def without_stops() -> Any:
        places = choice.stop_ids.unsqueeze(0).expand([paddle.shape(logits)[0], -1])
        return paddle.put_along_axis(logits, places, paddle.full([], _NEVER), axis=1)

    return cond(step < choice.min_tokens, without_stops, lambda: logits)


def choose_tokens(logits: Any, step: Any, choice: Choice) -> Any:
    """The next token of every row, [B, 1]."""

    def most_probable() -> Any:
        return paddle.argmax(logits, axis=-1, keepdim=True)

    def drawn() -> Any:
        vocabulary = paddle.shape(logits)[1].astype("int64")
        num_kept = paddle.where(choice.top_k > 0, paddle.minimum(choice.top_k, vocabulary), vocabulary)
        probabilities, ids = paddle.topk(F.softmax(logits / choice.temperature), k=num_kept)
        before = paddle.cumsum(probabilities, axis=-1) - probabilities
        probabilities = paddle.where(before <= choice.top_p, probabilities, paddle.zeros([]))
        sums = paddle.cumsum(probabilities, axis=-1)
        draw = paddle.gather(choice.draws, step.reshape([1]), axis=1)  # [B, 1]
        place = (sums <= draw * sums[:, -1:]).astype("int64").sum(axis=-1, keepdim=True)
        last = (probabilities > 0).astype("int64").sum(axis=-1, keepdim=True) - 1
        return paddle.take_along_axis(ids, paddle.minimum(place, last), axis=1)

    return cond(choice.is_greedy, most_probable, drawn)
