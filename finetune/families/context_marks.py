"""The tokens that divide a text into a context, which all of the text sees, and an answer (GLM, Du et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ABSENT = 1 << 30
"""Place of a mark that a text lacks, behind all places."""


@dataclass(frozen=True)
class ContextMarks:
    """Ids of these tokens; the first of each in a text counts.

    Attributes:
        start: Begins the answer; what stands before it is the context.
        whole: Where in the context a whole answer belongs.
        part: Where in the context a part of the text is left out.
    """

    start: int
    whole: int
    part: int

    @property
    def ids(self) -> tuple[int, ...]:
        """In the order of the attributes."""
        return astuple(self)


def find_marks(texts: Sequence[Sequence[int]], ids: Sequence[int]) -> NDArray[np.int64]:
    """Places of the first of each mark in every text, [texts, marks]; `ABSENT` where there is none."""
    places = [[_first(text, index) for index in ids] for text in texts]
    return np.array(places, np.int64).reshape(len(texts), len(ids))


def _first(text: Any, index: int) -> int:
    found = np.flatnonzero(np.asarray(text) == index)
    return int(found[0]) if found.size else ABSENT
