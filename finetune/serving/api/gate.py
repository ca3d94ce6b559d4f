"""What stands in front of the server: who may ask, and until when.

A server on this machine can be reached by more than its owner: by a web page in the owner's browser, by other users of
the machine, and, once it listens on another address, by the network. So a request passes when its Host, and its Origin
where it has one, is an address or a name of this server; when the key is right, where there is one (a Bearer token); and
while the server is not about to end.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.responses import JSONResponse

from finetune.serving.api.answers import unavailable
from finetune.serving.api.errors import ApiError
from finetune.serving.web.asgi_types import Receive, Scope, Send
from finetune.serving.web.attempts import AddressCounts
from finetune.serving.web.hosts import is_known_host, place_of

FAILURES_PER_MINUTE = 10
HEALTH = "/health"


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Attributes:
        names: Host names by which it may be called.
        key: None asks for none.
        is_behind_proxy: Whether a proxy on this machine says for whom it asks (X-Forwarded-For); without one nobody is
            believed.
    """

    names: frozenset[str] = frozenset({"localhost"})
    key: str | None = field(default=None, repr=False)
    is_behind_proxy: bool = False


class Gate:
    """ASGI middleware that answers what must not pass.

    Args:
        app: What it guards.
        access: Who may use it.

    Attributes:
        access: Who may use it.
        is_closing: Whether nothing new is let in.
        num_open: Requests that are being answered.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], access: Access):
        self.is_closing = False
        self.num_open = 0
        self._app, self.access = app, access
        self._failures = AddressCounts(FAILURES_PER_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await refusal(error)(scope, receive, send)
            return
        self.num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.num_open -= 1

    def _check(self, scope: Scope) -> None:
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        if not is_known_host(headers.get("host", ""), self.access.names):
            raise ApiError(403, "This name is not one of the server's: see --allowed_hosts.")
        origin = headers.get("origin")
        if origin is not None and not is_known_host(place_of(origin), self.access.names):
            raise ApiError(403, "A web page must not use this server.")
        if self.is_closing:
            raise unavailable()
        if scope["path"] != HEALTH:
            self._check_key(headers.get("authorization", ""), str((scope.get("client") or [""])[0]))

    def _check_key(self, given: str, address: str) -> None:
        if self.access.key is None:
            return
        if self._failures.are_used_up(address):
            raise ApiError(429, "Too many wrong keys: wait a minute.", headers={"Retry-After": "60"})
        scheme, _, key = given.partition(" ")
        # Headers arrive as Latin-1; a key may hold any character.
        sent = key.strip().encode("latin-1")
        if scheme.lower() == "bearer" and hmac.compare_digest(sent, self.access.key.encode()):
            return
        if given:
            self._failures.add(address)
        raise ApiError(
            401,
            "The API key is wrong."
            if given
            else "An API key is needed: send it as Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def refusal(error: ApiError) -> JSONResponse:
    """The answer that tells an error; the connection ends, as the request's body may not have been read."""
    return JSONResponse(error.body(), error.status, {**error.headers, "Connection": "close"})
