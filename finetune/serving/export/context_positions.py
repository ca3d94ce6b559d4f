"""Positions and masks of texts that are divided into context and answer, as operations of the graph."""

from __future__ import annotations

from typing import Any

import paddle

from finetune.families.context_marks import ABSENT, ContextMarks
from finetune.families.two_positions import first_marks, positions_of


class ContextPositions:
    """What follows from where a text has its marks.

    Places of marks are int64 [B, 3], in the order of `ContextMarks`; the caller of the graph gives those of the tokens
    that the text has so far.

    Args:
        marks: Ids of the marks.
    """

    def __init__(self, marks: ContextMarks):
        self.ids = marks.ids

    def with_token(self, marks: Any, chosen: Any, places: Any) -> Any:
        """The places of marks once a text has one more token.

        Args:
            marks: Before.
            chosen: The token [B, 1].
            places: Where it stands [B, 1].
        """
        return first_marks(chosen, places, self.ids, before=marks)

    def positions(self, places: Any, marks: Any) -> Any:
        """Both positions [B, S, 2] of tokens at places [B, S]."""
        return paddle.stack([*positions_of(places, marks)], axis=-1)

    def contexts(self, places: Any, marks: Any) -> Any:
        """Bool [B, 1, T], whether keys at places [B, T], negative for padding, are in the context of their text."""
        start = marks[:, :1]
        return ((places >= 0) & (places < start) & (start < ABSENT)).unsqueeze(1)
