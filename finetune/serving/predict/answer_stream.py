"""Answers as iterators of text that can be stopped, all computed by one thread.

One thread, because models that share weights must not run at the same time, and because Paddle keeps the
device and the gradient switch per thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.responder import Responder


class StoppedError(Exception):
    """Nobody waits for the answer any more."""


class AnswerThread:
    """Computes answers one after another."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")

    def stream(
        self,
        responder: Responder,
        turns: Sequence[tuple[str, str]],
        message: str,
        settings: DecodingSettings,
        *,
        system: str | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """Stretches of text of the answer to a message.

        Args:
            responder: The model.
            turns: Earlier messages and answers.
            message: The new one.
            settings: How to generate.
            system: System text of the conversation.
            stop: Ends the answer where it is when set; so does closing the iterator.

        Raises:
            UserError: See `Responder.answer`.
        """
        texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        stop = stop or threading.Event()
        closed = threading.Event()

        def show(text: str) -> None:
            if stop.is_set() or closed.is_set():
                raise StoppedError
            texts.put(text)

        def work() -> None:
            try:
                if not stop.is_set() and not closed.is_set():
                    responder.answer(turns, message, settings, system=system, on_text=show)
            except StoppedError:
                pass
            finally:
                texts.put(None)

        future = self._executor.submit(work)
        try:
            while (text := texts.get()) is not None:
                yield text
            future.result()
        finally:
            closed.set()
