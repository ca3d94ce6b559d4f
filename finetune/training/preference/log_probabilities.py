"""Log-probabilities of the answers of a batch, from the losses of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.training.loss import token_losses

if TYPE_CHECKING:
    from finetune.data.batches.preference_rows import PreferenceBatch
    from finetune.processes.groups import Group


def sum_by_answer(batch: PreferenceBatch, losses: Any, *, averages: bool = False) -> Any:
    """Log-probability of each answer, float32 [answers].

    Tokens are gathered into one row for each answer and summed along it: unlike a sum by atomic additions, it has the
    same digits in every run.

    Args:
        batch: Which label belongs to which answer.
        losses: float32 [labels], -log p of each label.
        averages: Divides by the number of tokens.
    """
    import paddle

    places = paddle.to_tensor(_token_places(batch))  # [answers, longest]
    with_zero = paddle.concat([losses, paddle.zeros([1], dtype=losses.dtype)])  # what rows are filled up with
    sums = -with_zero.gather(places.reshape([-1])).reshape(places.shape).sum(axis=1)
    return sums / paddle.to_tensor(batch.answer_lengths.astype(np.float32)) if averages else sums


def answer_log_probabilities(
    batch: PreferenceBatch, logits: Any, label_ids: Any, tensor_group: Group | None, *, averages: bool = False
) -> tuple[Any, Any]:
    """Log-probabilities of the answers, and of the labels, in float32.

    Args:
        batch: What the logits were computed for.
        logits: [labels, vocabulary], under tensor parallelism this rank's part of the vocabulary.
        label_ids: int64 [labels].
        tensor_group: Ranks that hold the other parts of the vocabulary.
        averages: Whether those of answers are means over their tokens.

    Returns:
        float32 [answers] and the losses of the tokens, float32 [labels].
    """
    losses = token_losses(logits, label_ids, tensor_group)
    return sum_by_answer(batch, losses, averages=averages), losses


def learned_labels(batch: PreferenceBatch) -> NDArray[Any]:
    """Places, among the labels, of what the likelihood beside the preference counts: chosen answers and prompts."""
    is_learned = np.zeros(batch.num_answers + 1, dtype=bool)
    is_learned[-1] = True  # tokens of a prompt belong to the answer -1
    is_learned[[group[0] for group in batch.groups]] = True
    return np.flatnonzero(is_learned[batch.answer_of_label])


def _token_places(batch: PreferenceBatch) -> NDArray[Any]:
    """int64 [answers, longest], places of each answer's tokens among the labels; those of padding come after them."""
    numbers = batch.answer_of_label
    places = np.full((batch.num_answers, int(batch.answer_lengths.max())), len(numbers), np.int64)
    is_token = np.arange(places.shape[1]) < batch.answer_lengths[:, None]
    order = np.argsort(numbers, kind="stable")
    places[is_token] = order[np.count_nonzero(numbers < 0) :]
    return places
