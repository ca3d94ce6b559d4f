"""Rows that an exported graph decodes together, a few tokens of each a step."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.serving.batching.caches import CacheForm
from finetune.serving.batching.row import Row
from finetune.serving.decoding.decoder import StaticDecoder
from finetune.serving.decoding.settings import DecodingSettings

_TOKENS_PER_STEP = 8
"""A step copies the cache, however many tokens it makes; rows join and leave between steps only."""

_ROW_AXIS, _TOKEN_AXIS = 2, 3
"""Of the graph's cache, [1, K, B, T, D]."""


class StaticRows:
    """Makes batches of an exported model.

    Args:
        decoder: The model.
    """

    def __init__(self, decoder: StaticDecoder):
        self.decoder = decoder
        self.form = CacheForm(_ROW_AXIS, _TOKEN_AXIS, decoder.facts.num_prefix_tokens)

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """What the thread needs that uses this object: no gradients of what is done to the cache."""
        import paddle

        with paddle.no_grad():
            yield

    def batch_of(self, row: Row) -> Hashable:
        """Which rows can share a batch: the graph takes one temperature and one top_p."""
        settings = row.settings
        return settings.stop_ids, None if settings.is_greedy else (settings.temperature, settings.top_p)

    def start(self, rows: Sequence[Row]) -> tuple[StaticBatch, list[list[int]]]:
        """A batch of rows with the same tokens so far, and the next tokens of each."""
        ids = np.array([row.all_ids for row in rows], np.int64)
        batch = StaticBatch(self, rows, np.zeros(len(rows), np.int64), None)
        return batch, batch.run(ids, 1)


class StaticBatch:
    """Rows and their cache behind their last tokens but one.

    Attributes:
        rows: In the order of the cache's.
    """

    def __init__(
        self, maker: StaticRows, rows: Sequence[Row], padding: NDArray[Any], cache: list[Any] | None
    ):
        self.rows = list(rows)
        self._maker, self._padding, self._cache = maker, padding, cache

    def step(self) -> list[list[int]]:
        """A few more tokens of every row, at most as many as the row that ends first may have."""
        last = np.array([[row.tokens[-1]] for row in self.rows], np.int64)
        return self.run(last, min(_TOKENS_PER_STEP, *(row.num_left for row in self.rows)))

    def run(self, ids: NDArray[Any], num_tokens: int) -> list[list[int]]:
        """Reads ids [B, S] and makes tokens."""
        first = self.rows[0].settings
        settings = DecodingSettings(
            max_new_tokens=num_tokens,
            top_k=0,
            top_p=first.top_p,
            temperature=first.temperature,
            stop_ids=first.stop_ids,
        )
        draws = np.zeros((len(self.rows), num_tokens), np.float32)
        for place, row in enumerate(self.rows):
            if row.draws is not None:
                draws[place] = row.draws[len(row.tokens) : len(row.tokens) + num_tokens]
        tokens, self._cache = self._maker.decoder.run(
            ids, self._padding, draws, settings, self._cache, texts=[row.all_ids for row in self.rows]
        )
        found: list[list[int]] = tokens.tolist()
        return found

    def join(self, other: StaticBatch) -> StaticBatch:
        """The rows of both."""
        form, parts = self._maker.form, (self, other)
        width = max(form.num_columns(part._cache) for part in parts)
        padding = [part._padding + width - form.num_columns(part._cache) for part in parts]
        cache = form.join([part._cache for part in parts])
        return StaticBatch(self._maker, [*self.rows, *other.rows], np.concatenate(padding), cache)

    def keep(self, places: Sequence[int]) -> StaticBatch:
        """The rows at some places, without the columns in which none of them has a token."""
        form, padding = self._maker.form, self._padding[list(places)]
        empty = int(padding.min())
        cache = form.trim(form.keep(self._cache, places), empty)
        return StaticBatch(self._maker, [self.rows[place] for place in places], padding - empty, cache)
