"""The answers of one request on their way from the thread that decodes to the connection."""

from __future__ import annotations

import asyncio
import math
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from finetune.serving.api.errors import ApiError
from finetune.serving.batching.engine import ClosedError, Engine, QueueFullError
from finetune.serving.batching.row import Row, SamplingSettings, Update

_MOST_SECONDS_TO_WAIT = 60

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Answers:
    """Rows of one request: handed to the engine, listened to, and cancelled when nobody waits for them.

    Args:
        engine: Decodes.
        prompts: Token ids of each prompt.
        settings: Of all answers.
        num_answers: To each prompt.
        decode: Ids to text.

    Attributes:
        num_prompt_tokens: Of all prompts.
        num_tokens: Of each answer so far.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        num_answers: int,
        decode: Callable[[Sequence[int]], str],
    ):
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Update] | Exception] = asyncio.Queue()
        self._groups = [
            [
                Row(
                    prompt,
                    settings,
                    sample=sample,
                    decode=decode,
                    on_update=self._told(place * num_answers + sample),
                )
                for sample in range(num_answers)
            ]
            for place, prompt in enumerate(prompts)
        ]
        self.num_prompt_tokens = sum(map(len, prompts))
        self.num_tokens = [0] * (len(prompts) * num_answers)

    def submit(self) -> None:
        """Hands the rows over.

        Raises:
            ApiError: Too many wait (429), or the server ends (503).
        """
        num_rows = sum(map(len, self._groups))
        if num_rows > self._engine.max_rows:
            raise ApiError(
                400,
                f"The request asks for {num_rows} answers, this server makes at most {self._engine.max_rows} at a time.",
                param="n",
            )
        try:
            self._engine.submit(self._groups)
        except QueueFullError:
            raise busy(self._engine) from None
        except ClosedError:
            raise unavailable() from None

    async def updates(self, receive: Receive, seconds: float) -> AsyncIterator[tuple[int, Update]]:
        """Number of an answer and what is new of it, until all are finished; what ends it early cancels the rows.

        Args:
            receive: Of the connection, behind the request's body.
            seconds: Longest time, waiting included.

        Raises:
            ClientGoneError: The connection has ended.
            ApiError: The time is over (504), the server ends (503), or the model failed (500).
        """
        watcher = self._loop.create_task(self._watch(receive))
        over = ApiError(504, f"The answer took longer than {seconds:g} seconds.", code="timeout")
        timer = self._loop.call_later(seconds, self._news.put_nowait, over)
        num_open = len(self.num_tokens)
        try:
            while num_open:
                item = await self._news.get()
                if isinstance(item, Exception):
                    raise item
                number, update = item
                if update.error is not None:
                    raise _describe(update.error)
                self.num_tokens[number] = update.num_tokens
                num_open -= update.finish is not None
                yield number, update
        finally:
            timer.cancel()
            watcher.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Gives the rows up."""
        self._engine.cancel([row for rows in self._groups for row in rows])

    def usage(self) -> dict[str, int]:
        """The numbers of tokens as OpenAI's interface tells them."""
        made = sum(self.num_tokens)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.num_prompt_tokens + made,
        }

    def _told(self, number: int) -> Callable[[Update], None]:
        def tell(update: Update) -> None:
            self._loop.call_soon_threadsafe(self._news.put_nowait, (number, update))

        return tell

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._news.put_nowait(ClientGoneError())


def busy(engine: Engine) -> ApiError:
    """What is answered while as many rows wait as may."""
    seconds = min(max(math.ceil(engine.seconds_to_room), 1), _MOST_SECONDS_TO_WAIT)
    return ApiError(
        429,
        "Too many requests wait: try again a little later.",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


def unavailable() -> ApiError:
    """What is answered while the server ends."""
    return ApiError(503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "5"})


def _describe(error: BaseException) -> ApiError:
    """What the client is told; the details are for the log."""
    if isinstance(error, ClosedError):
        return unavailable()
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    print("".join(["a request failed:\n", *lines]), file=sys.stderr, flush=True)
    return ApiError(500, "The model failed on this request.", code="model_failed")
