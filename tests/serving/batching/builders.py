"""Rows of all kinds, what each must become, and a model that fails when it is told to."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finetune.serving.batching.engine import Engine
from finetune.serving.batching.row import Row, SamplingSettings, Update
from finetune.serving.decoding.settings import DecodingSettings


def letters(ids: Sequence[int]) -> str:
    """A tokenizer: every id is a letter."""
    return "".join(chr(97 + token % 26) for token in ids)


class Told:
    """Gathers what rows are told.

    Attributes:
        ended: Numbers of rows whose last update has come, in that order.
        last: That update.
        texts: Text of every row so far.
    """

    def __init__(self) -> None:
        self.ended: queue.Queue[int] = queue.Queue()
        self.last: dict[int, Update] = {}
        self.texts: dict[int, str] = {}

    def of(self, number: int) -> Callable[[Update], None]:
        """What the row of a number calls."""

        def tell(update: Update) -> None:
            self.texts[number] = self.texts.get(number, "") + update.text
            if update.finish or update.error:
                self.last[number] = update
                self.ended.put(number)

        return tell

    def wait(self, count: int, seconds: float = 60) -> list[int]:
        """Waits for the ends of so many rows."""
        return [self.ended.get(timeout=seconds) for _ in range(count)]


def make_row(told: Told, number: int, prompt: Sequence[int], *, sample: int = 0, **settings: Any) -> Row:
    """A row that tells of itself under a number."""
    chosen = SamplingSettings(**{"max_new_tokens": 8, "temperature": 0.0, **settings})
    return Row(prompt, chosen, sample=sample, decode=letters, on_update=told.of(number))


def alone(decoder: Any, row: Row, sample: int = 0) -> list[int]:
    """The answer of the same request when nothing else runs, by the way that files are answered."""
    own = row.settings
    settings = DecodingSettings(
        max_new_tokens=own.max_new_tokens,
        temperature=own.temperature,
        top_p=own.top_p,
        top_k=0,
        seed=own.seed,
        stop_ids=own.stop_ids,
    )
    return decoder.generate([list(row.prompt)], settings, samples=[sample])[0]


@contextlib.contextmanager
def decoding(maker: Any, *, max_rows: int = 3, max_waiting: int = 100) -> Iterator[Engine]:
    """An engine that runs."""
    engine = Engine(maker, max_rows=max_rows, max_waiting=max_waiting)
    engine.start()
    try:
        yield engine
    finally:
        engine.close(timeout=30)


class CountingMaker:
    """A model that counts on from the last token; it fails where it is told to.

    Attributes:
        sizes: Number of rows in every step.
        fails: Asked before every step and before every prompt, with the rows.
        gate: Steps wait for it.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.fails: Callable[[Sequence[Row]], bool] = lambda rows: False
        self.gate = threading.Event()
        self.gate.set()

    def inference(self) -> Any:
        return contextlib.nullcontext()

    def batch_of(self, row: Row) -> None:
        return None

    def start(self, rows: Sequence[Row]) -> tuple[CountingBatch, list[list[int]]]:
        self.check(rows)
        return CountingBatch(self, rows), [[row.all_ids[-1] + 1] for row in rows]

    def check(self, rows: Sequence[Row]) -> None:
        self.gate.wait(30)
        if self.fails(rows):
            raise RuntimeError("told to fail")


class CountingBatch:
    def __init__(self, maker: CountingMaker, rows: Sequence[Row]):
        self.rows, self._maker = list(rows), maker

    def step(self) -> list[list[int]]:
        self._maker.sizes.append(len(self.rows))
        self._maker.check(self.rows)
        return [[row.tokens[-1] + 1] for row in self.rows]

    def join(self, other: CountingBatch) -> CountingBatch:
        return CountingBatch(self._maker, [*self.rows, *other.rows])

    def keep(self, places: Sequence[int]) -> CountingBatch:
        return CountingBatch(self._maker, [self.rows[place] for place in places])
