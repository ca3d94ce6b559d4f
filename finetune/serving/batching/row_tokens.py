"""The next token of rows that have settings of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.serving.batching.row import Row

_ALL_PROBABILITY = 2.0
"""Where top_p is 1, so that rounding does not drop the last token."""


def choose_row_tokens(logits: Any, rows: Sequence[Row]) -> list[int]:
    """The next token of every row.

    Args:
        logits: Float32 [B, vocabulary].
        rows: B rows.

    Returns:
        For each row the token that it gets alone: nothing is computed across rows.
    """
    import paddle

    tokens: list[int] = paddle.argmax(logits, axis=-1).tolist()
    sampled = [place for place, row in enumerate(rows) if not row.settings.is_greedy]
    if sampled:
        chosen = _sample(
            logits[sampled] if len(sampled) < len(rows) else logits, [rows[each] for each in sampled]
        )
        for place, token in zip(sampled, chosen, strict=True):
            tokens[place] = token
    return tokens


def _sample(logits: Any, rows: Sequence[Row]) -> list[int]:
    import paddle

    from finetune.serving.decoding.token_choice import Choice, choose_tokens

    settings = [row.settings for row in rows]
    factors = [
        [each.temperature for each in settings],
        [each.top_p if each.top_p < 1 else _ALL_PROBABILITY for each in settings],
        [1.0] * len(rows),
    ]
    draws = [[float(row.draws[len(row.tokens)])] for row in rows if row.draws is not None]
    choice = Choice(
        paddle.to_tensor([0, 0, 0, 0], "int64"),
        paddle.to_tensor(factors, "float32").unsqueeze(-1),  # [3, B, 1]
        paddle.to_tensor([-1], "int64"),
        paddle.to_tensor(draws, "float32"),
    )
    tokens: list[int] = choose_tokens(logits, paddle.to_tensor(0, "int64"), choice).reshape([-1]).tolist()
    return tokens
