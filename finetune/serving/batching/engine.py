"""The thread that decodes: between two steps waiting rows join and finished ones leave.

One thread runs the model, because Paddle keeps device and gradient switch per thread and because nothing is gained by
two. The queue is first come, first served. A prompt is read by itself, so that it is computed as if it were alone; what
the others wait for it is bounded by `_PROMPT_TOKENS_PER_STEP` and the length of one prompt.

A step that fails is one over several rows, and nobody knows whose fault it was: each of them is then read again, with
the tokens that it has, and decoded without others; what fails there fails that row alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from finetune.serving.batching.row import Row

_PROMPT_TOKENS_PER_STEP = 1024
_NEWEST_SHARE = 0.2
"""Of the last row in the mean time of a row."""


class Batch(Protocol):
    """Rows that are decoded together."""

    rows: list[Row]

    def step(self) -> list[list[int]]:
        """The next tokens of every row."""

    def join(self, other: Batch) -> Batch:
        """The rows of both."""

    def keep(self, places: Sequence[int]) -> Batch:
        """The rows at some places."""


class BatchMaker(Protocol):
    """A model that decodes batches."""

    def inference(self) -> AbstractContextManager[None]:
        """What the thread needs in which it runs."""

    def batch_of(self, row: Row) -> Hashable:
        """Rows for which this is equal can share a batch."""

    def start(self, rows: Sequence[Row]) -> tuple[Batch, list[list[int]]]:
        """A batch of rows with the same tokens so far, and their next tokens."""


class QueueFullError(Exception):
    """As many rows wait as may."""


class ClosedError(Exception):
    """No more answers are made."""


class Engine:
    """Decodes rows.

    Args:
        maker: The model.
        max_rows: Most rows that are decoded at the same time.
        max_waiting: Most rows that wait beside them.
    """

    def __init__(self, maker: BatchMaker, *, max_rows: int, max_waiting: int):
        self.max_rows = max_rows
        self._maker, self._max_waiting = maker, max_waiting
        self._waiting: deque[list[Row]] = deque()
        self._batches: dict[Hashable, Batch] = {}
        self._running: list[Row] = []
        self._row_seconds = 0.0
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """Begins to decode."""
        self._thread.start()

    def submit(self, groups: Sequence[Sequence[Row]]) -> None:
        """Hands over the rows of one request: all of them, or none. May be called by any thread.

        Args:
            groups: The rows of a group have the same prompt.

        Raises:
            QueueFullError: Too many rows wait.
            ClosedError: `close` was called, or the thread has ended.
        """
        with self._changed:
            if self._is_closed:
                raise ClosedError
            if self.num_rows + sum(map(len, groups)) > self.max_rows + self._max_waiting:
                raise QueueFullError
            self._waiting.extend(list(rows) for rows in groups)
            self._changed.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Ends rows; those that wait give their places back at once. May be called by any thread."""
        for row in rows:
            row.cancel()
        with self._changed:
            self._forget_cancelled()
            self._changed.notify()

    @property
    def is_closed(self) -> bool:
        """Whether no more answers are made: `close` was called, or the thread has ended."""
        return self._is_closed

    @property
    def is_full(self) -> bool:
        """Whether not even one more row may wait."""
        return self.num_rows >= self.max_rows + self._max_waiting

    @property
    def seconds_to_room(self) -> float:
        """About how long it takes until the next row leaves, as rows went lately."""
        return self._row_seconds / self.max_rows

    @property
    def num_rows(self) -> int:
        """Rows that run or wait."""
        return len(self._running) + sum(map(len, self._waiting))

    def close(self, timeout: float | None = None) -> None:
        """Ends the thread behind the step that runs; rows that are not finished are told so."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            with self._maker.inference():
                while self._wait():
                    self._admit()
                    for key in list(self._batches):
                        self._advance(key)
        finally:
            with self._changed:
                self._is_closed = True
                left = [*(row for rows in self._waiting for row in rows), *self._running]
                self._waiting.clear()
                self._batches.clear()
                self._running = []
            for row in left:
                row.fail(ClosedError())

    def _wait(self) -> bool:
        """Until there is something to do; whether there is."""
        with self._changed:
            while not (self._waiting or self._batches or self._is_closed):
                self._changed.wait()
            return not self._is_closed

    def _forget_cancelled(self) -> None:
        kept = [[row for row in rows if not row.is_cancelled] for rows in self._waiting]
        self._waiting = deque(rows for rows in kept if rows)

    def _admit(self) -> None:
        """Lets waiting rows join, as many as there is room for and as the others can wait for."""
        num_tokens = 0
        while num_tokens < _PROMPT_TOKENS_PER_STEP and (rows := self._take_waiting()):
            num_tokens += len(rows[0].all_ids)
            self._start(rows)

    def _take_waiting(self) -> list[Row]:
        """The next rows that join; they count as running from now on."""
        with self._changed:
            self._forget_cancelled()
            room = self.max_rows - len(self._running)
            if not self._waiting or room <= 0 or self._must_be_alone(self._waiting[0]):
                return []
            first = self._waiting.popleft()
            rows, rest = first[:room], first[room:]
            if rest:
                self._waiting.appendleft(rest)
            self._running += rows
            for row in rows:
                row.started = time.monotonic()
            return rows

    def _must_be_alone(self, rows: Sequence[Row]) -> bool:
        """Whether rows have to wait until the others have ended."""
        return bool(self._running) and any(row.was_in_failure for row in (*rows, *self._running))

    def _start(self, rows: list[Row]) -> None:
        try:
            batch, news = self._maker.start(rows)
        except Exception as error:
            self._retry(rows, error)
            return
        open_batch = self._take(batch, news)
        if open_batch is None:
            return
        key = self._maker.batch_of(rows[0])
        others = self._batches.get(key)
        try:
            self._batches[key] = open_batch if others is None else others.join(open_batch)
        except Exception as error:
            self._retry(open_batch.rows, error)

    def _advance(self, key: Hashable) -> None:
        batch = self._batches.pop(key)
        try:
            news = batch.step()
        except Exception as error:
            self._retry(batch.rows, error)
            return
        if (open_batch := self._take(batch, news)) is not None:
            self._batches[key] = open_batch

    def _take(self, batch: Batch, news: Sequence[Sequence[int]]) -> Batch | None:
        """Hands new tokens to the rows; the batch of those that are not finished."""
        open_places = [
            place for place, (row, ids) in enumerate(zip(batch.rows, news, strict=True)) if not row.take(ids)
        ]
        self._leave([row for place, row in enumerate(batch.rows) if place not in open_places])
        if not open_places:
            return None
        if len(open_places) == len(batch.rows):
            return batch
        try:
            return batch.keep(open_places)
        except Exception as error:
            self._retry([batch.rows[place] for place in open_places], error)
            return None

    def _retry(self, rows: Sequence[Row], error: Exception) -> None:
        """Puts rows whose step failed in front of the queue, to run alone; one that was alone has failed."""
        self._leave(rows)
        if len(rows) == 1 and not self._batches:
            rows[0].was_in_failure = True
            rows[0].fail(error)
            return
        again = []
        for row in rows:
            if row.was_in_failure:
                row.fail(error)
            else:
                row.was_in_failure = True
                again.append([row])
        with self._changed:
            self._waiting.extendleft(reversed(again))

    def _leave(self, rows: Sequence[Row]) -> None:
        with self._changed:
            self._running = [row for row in self._running if row not in rows]
            for row in rows:
                self._row_seconds += _NEWEST_SHARE * (time.monotonic() - row.started - self._row_seconds)
