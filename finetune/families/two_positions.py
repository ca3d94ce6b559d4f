"""The two positions of each token of a text that is divided into context and answer (GLM, Du et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle

from finetune.families.context_marks import ABSENT


def first_marks(
    ids: Any, places: Any, mark_ids: Sequence[int], *, before: Any = None, real: Any = None
) -> Any:
    """Places of the first of each mark in every text, int64 [batch, marks]; `ABSENT` where there is none.

    Args:
        ids: [batch, length], a text in each row, or more tokens of it.
        places: Of these tokens in their texts, int64 [batch, length].
        mark_ids: Ids of the marks.
        before: What was found in the tokens before these; None: there are none.
        real: Bool [batch, length], false for padding; None: there is none.
    """
    is_mark = ids.unsqueeze(2) == paddle.to_tensor(list(mark_ids), dtype="int64")  # [batch, length, marks]
    if real is not None:
        is_mark = is_mark & real.unsqueeze(2)
    places = places.unsqueeze(2).expand_as(is_mark)
    found = paddle.where(is_mark, places, paddle.full_like(places, ABSENT)).min(axis=1)
    return found if before is None else paddle.minimum(found, before)


def answer_place(start: Any, whole: Any, part: Any) -> Any:
    """Place in the context that the answer stands for.

    Args:
        start: Place of the token that begins the answer; `ABSENT` for none. All three are int64 of one shape.
        whole: Of the mark of a whole answer.
        part: Of the mark of a left out part.
    """
    mask = paddle.where(whole < ABSENT, whole, part)
    return paddle.where(mask < ABSENT, mask, (start - 1).clip(min=0))


def positions_of(places: Any, marks: Any) -> tuple[Any, Any]:
    """`two_positions` of tokens at places [batch, length], each row a text with its marks [batch, 3]."""
    start, whole, part = paddle.split(marks, 3, axis=1)  # [batch, 1] each, in the order of `ContextMarks`
    return two_positions(places, start, answer_place(start, whole, part).expand_as(places))


def two_positions(places: Any, start: Any, answer: Any) -> tuple[Any, Any]:
    """Position in the context, and position in the answer: 0 in the context, 1 for the token that begins the answer.

    Args:
        places: int64, of each token in its text.
        start: Of the token that begins the answer; broadcasts to `places`.
        answer: What `answer_place` gives, like `start`.
    """
    answers = places >= start  # no place is as far as ABSENT
    first = paddle.where(answers, answer, places)
    return first, paddle.where(answers, places - start + 1, paddle.zeros_like(places))
