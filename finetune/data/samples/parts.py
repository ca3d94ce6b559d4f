"""Token ids in parts: stretches that are learned, or not, as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError

Part = tuple[NDArray[Any], bool]
"""Ids, int32 [N] with N > 0, and whether they are learned."""


def as_ids(ids: Sequence[int] | NDArray[Any]) -> NDArray[Any]:
    """int32 [N]."""
    try:
        return np.asarray(ids, dtype=np.int32)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"the tokenizer gives ids that are no numbers ({error}): copy its files again"
        ) from None


def count_tokens(parts: Iterable[Part]) -> int:
    """Tokens of all parts together."""
    total = 0
    for ids, _ in parts:
        total += len(ids)
    return total


def take_first(parts: Iterable[Part], num_tokens: int) -> list[Part]:
    """The first tokens, at most `num_tokens`."""
    taken: list[Part] = []
    for ids, learned in parts:
        if num_tokens <= 0:
            break
        taken.append((ids[:num_tokens], learned))
        num_tokens -= len(ids)
    return taken


def drop_first(parts: Sequence[Part], num_tokens: int) -> list[Part]:
    """All tokens but the first `num_tokens`."""
    for place, (ids, learned) in enumerate(parts):
        if num_tokens < len(ids):
            return [(ids[num_tokens:], learned), *parts[place + 1 :]]
        num_tokens -= len(ids)
    return []


def join_ids(stretches: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """int32, all ids in a row."""
    return np.concatenate(stretches) if stretches else np.zeros(0, np.int32)
