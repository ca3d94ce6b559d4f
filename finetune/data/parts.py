"""Token ids in parts: stretches that are learned, or not, as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Ids = Sequence[int] | np.ndarray
"""Some ids, int32 [N] where they are an array."""

Part = tuple[Ids, bool]
"""Ids, at least one, and whether they are learned."""


def count_tokens(parts: Iterable[Part]) -> int:
    """Tokens of all parts together."""
    return sum(len(ids) for ids, _ in parts)


def take_first(parts: Sequence[Part], num_tokens: int) -> list[Part]:
    """The first tokens, at most `num_tokens`."""
    taken: list[Part] = []
    for ids, learned in parts:
        if num_tokens <= 0:
            break
        taken.append((ids[:num_tokens], learned))
        num_tokens -= len(ids)
    return taken


def leave_first(parts: Sequence[Part], num_tokens: int) -> list[Part]:
    """All tokens but the first `num_tokens`."""
    for place, (ids, learned) in enumerate(parts):
        if num_tokens < len(ids):
            return [(ids[num_tokens:], learned), *parts[place + 1 :]]
        num_tokens -= len(ids)
    return []


def join_ids(stretches: Sequence[Ids]) -> np.ndarray:
    """int32, all ids in a row."""
    if not stretches:
        return np.zeros(0, np.int32)
    return np.concatenate([np.asarray(ids, dtype=np.int32) for ids in stretches])
