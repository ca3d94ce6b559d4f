"""Answers as iterators of text that can be stopped: one message at a time, its answers by turns.

Models that share weights must not run at the same time, and Paddle keeps the device and the gradient switch per thread.
So every answer of a message has a thread of its own, of which one computes: it goes on to its next stretch of text and
hands over. Two models seem to answer at once, each at half its speed.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.responder import Responder


class StoppedError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Answerer:
    """Who answers a message.

    Attributes:
        responder: The model.
        turns: Its earlier messages and answers.
    """

    responder: Responder
    turns: Sequence[tuple[str, str]] = ()


@dataclass
class _Message:
    """A message and what is said to it.

    Attributes:
        text: What the person wrote.
        settings: How to generate.
        system: System text of the conversation.
        stop: Ends the answers where they are when set.
        closed: The same, where nobody reads them any more.
        said: Stretches of text with the number of who says them; None at the end.
    """

    text: str
    settings: DecodingSettings
    system: str | None
    stop: threading.Event
    closed: threading.Event = field(default_factory=threading.Event)
    said: queue.SimpleQueue[tuple[int, str] | None] = field(default_factory=queue.SimpleQueue)

    @property
    def is_over(self) -> bool:
        """Whether nobody wants more of it."""
        return self.stop.is_set() or self.closed.is_set()


class AnswerThread:
    """Computes the answers to one message after another."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="messages")

    def stream(
        self,
        answerers: Sequence[Answerer],
        text: str,
        settings: DecodingSettings,
        *,
        system: str | None = None,
        stop: threading.Event | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Stretches of text of all answers to a message, each with the number of who says it.

        Args:
            answerers: Who answers.
            text: The message.
            settings: How to generate.
            system: System text of the conversation.
            stop: Ends the answers where they are when set; so does closing the iterator.

        Raises:
            UserError: See `Responder.answer`; the other answers end, too.
        """
        message = _Message(text, settings, system, stop or threading.Event())
        future = self._executor.submit(_answer_all, answerers, message)
        try:
            while (said := message.said.get()) is not None:
                yield said
            future.result()
        finally:
            message.closed.set()


def _answer_all(answerers: Sequence[Answerer], message: _Message) -> None:
    """Has every model answer, in threads that take turns."""
    turns = _Turns(len(answerers))

    def answer(number: int, answerer: Answerer) -> None:
        def say(text: str) -> None:
            if message.is_over:
                raise StoppedError
            message.said.put((number, text))
            turns.hand_over(number)

        try:
            turns.wait(number)
            if not message.is_over:
                answerer.responder.answer(
                    answerer.turns, message.text, message.settings, system=message.system, on_text=say
                )
        except StoppedError:
            pass
        except BaseException:
            message.closed.set()
            raise
        finally:
            turns.leave(number)

    try:
        with ThreadPoolExecutor(max_workers=len(answerers), thread_name_prefix="answer") as executor:
            futures = [executor.submit(answer, *each) for each in enumerate(answerers)]
        for future in futures:
            future.result()
    finally:
        message.said.put(None)


class _Turns:
    """Whose turn it is among threads that wait for each other.

    Args:
        num_threads: They are called 0, 1, ... and begin in this order.
    """

    def __init__(self, num_threads: int):
        self._order = deque(range(num_threads))
        self._changed = threading.Condition()

    def wait(self, number: int) -> None:
        """Waits for the turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == number)

    def hand_over(self, number: int) -> None:
        """Lets the next one work, and waits for the turn to come back."""
        with self._changed:
            self._order.rotate(-1)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._order[0] == number)

    def leave(self, number: int) -> None:
        """Takes no more turns."""
        with self._changed:
            self._order.remove(number)
            self._changed.notify_all()
