"""The requests that are answered, and how."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from finetune.serving.api.answers import Answers, ClientGoneError, busy
from finetune.serving.api.errors import ApiError
from finetune.serving.api.fields import parse_object
from finetune.serving.api.formats import DONE, ChatFormat, CompletionFormat, event
from finetune.serving.api.gate import HEALTH, Access, Gate, refusal
from finetune.serving.api.model import ServedModel
from finetune.serving.api.requests import Wishes, read_chat, read_completion
from finetune.serving.batching.engine import Engine
from finetune.serving.batching.row import Update

MAX_BODY_BYTES = 2 * 2**20
BODY_SECONDS = 20.0
_CLIENT_CLOSED = 499
"""Nobody reads it."""

_Result = TypeVar("_Result")
Updates = AsyncIterator[tuple[int, Update]]


@dataclass(frozen=True)
class Service:
    """Answers requests about one model.

    Attributes:
        model: The model.
        engine: Decodes.
        request_seconds: Longest time of a request.
        encoding: The thread in which texts become tokens.
        created: Unix time since when the model is offered.
    """

    model: ServedModel
    engine: Engine
    request_seconds: float
    encoding: ThreadPoolExecutor
    created: int

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        wishes, conversation = await self._compute(read_chat, await self._read(request))
        self.model.check_name(wishes.model)
        prompt = await self._compute(self.model.encode_conversation, conversation)
        form = ChatFormat(self.model.name, wishes.includes_usage)
        return await self._answer(request, wishes, [prompt], form, "messages")

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        wishes, texts = await self._compute(read_completion, await self._read(request))
        self.model.check_name(wishes.model)
        if len(texts) > self.engine.max_rows:  # before they are encoded
            raise ApiError(
                400, f"prompt has {len(texts)} texts, {self.engine.max_rows} are allowed.", param="prompt"
            )
        prompts = [await self._compute(self.model.encode_text, text) for text in texts]
        form = CompletionFormat(self.model.name, wishes.includes_usage)
        return await self._answer(request, wishes, prompts, form, "prompt")

    async def list_models(self, _request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._describe_model()]})

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self.model.check_name(request.path_params["name"])
        return JSONResponse(self._describe_model())

    async def show_health(self, _request: Request) -> Response:
        """GET /health."""
        if self.engine.is_closed:
            raise ApiError(503, "The model does not run any more.", code="model_failed")
        return JSONResponse({"status": "ok"})

    async def _read(self, request: Request) -> dict[str, Any]:
        """The object of a request; while no row could even wait its body is not read."""
        if self.engine.is_full:
            raise busy(self.engine)
        return await self._compute(parse_object, await _read_body(request))

    def _describe_model(self) -> dict[str, Any]:
        return {
            "id": self.model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "paddle-finetune",
        }

    async def _compute(self, function: Callable[..., _Result], *args: Any) -> _Result:
        """Runs what may take a while beside the loop; one at a time, because tokenizers keep a state."""
        return await asyncio.get_running_loop().run_in_executor(self.encoding, function, *args)

    async def _answer(
        self, request: Request, wishes: Wishes, prompts: list[list[int]], form: ChatFormat, param: str
    ) -> Response:
        settings = self.model.settings(wishes, prompts, param)
        answers = Answers(
            self.engine, prompts, settings, num_answers=wishes.num_answers, decode=self.model.decode
        )
        answers.submit()
        updates = answers.updates(request.receive, self.request_seconds)
        if not wishes.streams:
            return await _collect(answers, updates, form)
        try:
            # What fails before the first text is told by the status.
            first = await anext(updates)
        except BaseException:
            answers.cancel()
            raise
        return StreamingResponse(
            _stream(answers, first, updates, form, wishes.includes_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )


async def _collect(answers: Answers, updates: Updates, form: ChatFormat) -> Response:
    texts = [""] * len(answers.num_tokens)
    finishes: list[str | None] = [None] * len(texts)
    async with aclosing(updates):  # type: ignore[type-var]
        async for number, update in updates:
            texts[number] += update.text
            finishes[number] = update.finish
    return JSONResponse(form.whole(texts, finishes, answers.usage()))


async def _stream(
    answers: Answers, first: tuple[int, Update], updates: Updates, form: ChatFormat, includes_usage: bool
) -> AsyncIterator[bytes]:
    """The events of a stream; what fails on the way is its last one."""
    async with aclosing(updates):  # type: ignore[type-var]
        try:
            for part in form.begin(len(answers.num_tokens)):
                yield event(part)
            for part in form.part(first[0], first[1].text, first[1].finish):
                yield event(part)
            async for number, update in updates:
                for part in form.part(number, update.text, update.finish):
                    yield event(part)
        except ApiError as error:
            yield event(error.body())
            return
        except ClientGoneError:
            return
        if includes_usage:
            yield event(form.usage(answers.usage()))
        yield DONE


async def _read_body(request: Request) -> bytes:
    """The body, up to the limits of length and patience.

    Raises:
        ApiError: It is longer (413), or does not come (408).
    """
    too_long = ApiError(413, f"The body may have {MAX_BODY_BYTES} bytes.")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 12 or int(length) > MAX_BODY_BYTES:
        raise too_long

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"The body did not come within {BODY_SECONDS:g} seconds.") from None


async def _tell_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refusal(error)


async def _tell_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    text = {404: f"There is no {what}.", 405: f"{what} is not possible."}.get(error.status_code, error.detail)
    return refusal(ApiError(error.status_code, text, headers=error.headers))


async def _tell_fault(_request: Request, _error: Exception) -> Response:
    return refusal(ApiError(500, "The server failed on this request."))


async def _tell_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED)


def build_app(model: ServedModel, engine: Engine, access: Access, *, request_seconds: float) -> Gate:
    """The server as an ASGI application."""
    encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoding")
    service = Service(model, engine, request_seconds, encoding, int(time.time()))
    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/models", service.list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", service.show_model, methods=["GET"]),
        Route(HEALTH, service.show_health, methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {
        ApiError: _tell_error,
        HTTPException: _tell_http_error,
        ClientGoneError: _tell_nobody,
        ClientDisconnect: _tell_nobody,
        Exception: _tell_fault,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Gate(app, access)
