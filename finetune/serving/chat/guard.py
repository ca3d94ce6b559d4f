"""What stands in front of the chat page: who may ask, for what, how much and how often.

A page on this machine can be reached by more than its owner: by a web page in the owner's browser (which may send
requests to 127.0.0.1, or have its own name resolve to it), by other users of the machine, and, once it listens on
another address, by the network. So, before Gradio sees a request:

- its Host, and its Origin where it has one, must be an address or a name of this page;
- the password must be right, where there is one (HTTP Basic, RFC 7617; any user name);
- it must be one that the page itself makes: there is no upload, no proxy, no API (`_GETS`, `_POSTS`);
- its body must not be longer than `MAX_BODY_BYTES`, and an address may send `POSTS_PER_MINUTE` and fail the password
  `FAILURES_PER_MINUTE` times.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from finetune.serving.web.asgi_types import Receive, Scope, Send
from finetune.serving.web.attempts import AddressCounts
from finetune.serving.web.hosts import is_known_host, place_of

MAX_BODY_BYTES = 256 * 1024
BODY_SECONDS = 20.0
POSTS_PER_MINUTE = 120
FAILURES_PER_MINUTE = 10

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_GETS = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/(assets|static|svelte)/[\w./@-]+"
    r"|/gradio_api/(info/?|theme\.css|app_id/?|startup-events|queue/data|heartbeat/[\w-]+)"
)
_POSTS = re.compile(r"/gradio_api/(queue/join|run/[\w-]+|cancel|reset)/?")


@dataclass(frozen=True)
class Access:
    """Who may use the page.

    Attributes:
        names: Host names by which it may be called, in small letters; an IP address always may, as a browser that
            was tricked says the name that it was tricked with.
        password: None asks for none.
        is_behind_proxy: Whether a proxy on this machine says for whom it asks (X-Forwarded-For). Without one nobody is
            believed, as every program here could name a new address for each guess.
    """

    names: frozenset[str] = frozenset({"localhost"})
    password: str | None = field(default=None, repr=False)
    is_behind_proxy: bool = False

    def knows_host(self, host: str) -> bool:
        """Whether a header Host (name or address, with or without a port) is one of this page's."""
        return is_known_host(host, self.names)


class Guard:
    """ASGI middleware that answers what must not pass, and adds the headers that limit a browser.

    Args:
        app: What it guards.
        access: Who may use it.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], access: Access):
        self._app = app
        self._access = access
        self._posts = AddressCounts(POSTS_PER_MINUTE)
        self._failures = AddressCounts(FAILURES_PER_MINUTE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or hands it on."""
        if scope["type"] == "websocket":  # the page uses none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (answer := self._refusal(scope)) is not None:
            await _answer(send, *answer)
            return
        body = _LimitedBody(receive)
        replies = _Replies(send, body)
        try:
            await self._app(scope, body.receive, replies.send)
        except RuntimeError as error:
            if not _is_refusal(error):
                raise
            # A stream that was asked for under a name that does not exist: its answer had begun before that showed.
            await replies.send({"type": "http.response.body", "body": b""})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and words for a request that must not pass."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        address = str((scope.get("client") or [""])[0])
        if not self._access.knows_host(headers.get("host", "")):
            return 403, "This name is not one of the page's: see --allowed_hosts."
        origin = headers.get("origin")
        if origin is not None and not self._access.knows_host(place_of(origin)):
            return 403, "Another page must not use this one."
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] != "GET":
            return 403, "Another page must not use this one."
        if (answer := self._check_password(headers.get("authorization", ""), address)) is not None:
            return answer
        return self._check_request(scope, headers, address)

    def _check_password(self, given: str, address: str) -> tuple[int, str] | None:
        if self._access.password is None:
            return None
        if self._failures.are_used_up(address):
            return 429, "Too many wrong passwords: wait a minute."
        if hmac.compare_digest(_password_of(given).encode(), self._access.password.encode()):
            return None
        if given:
            self._failures.add(address)
        return 401, "The page asks for a password."

    def _check_request(self, scope: Scope, headers: dict[str, str], address: str) -> tuple[int, str] | None:
        method, path = scope["method"], scope["path"]
        if method in ("GET", "HEAD"):
            return None if _GETS.fullmatch(path) and ".." not in path else (404, "There is no such page.")
        if method != "POST" or not _POSTS.fullmatch(path):
            return 404, "There is no such page."
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 12 or int(length) > MAX_BODY_BYTES:
            return 413, f"A request may have {MAX_BODY_BYTES} bytes."
        if self._posts.are_used_up(address):
            return 429, f"More than {POSTS_PER_MINUTE} requests in a minute: wait a little."
        self._posts.add(address)
        return None


class _LimitedBody:
    """Reads a body up to the limits of length and patience; what comes behind them is not read."""

    def __init__(self, receive: Receive):
        self.is_too_long = False
        self._receive = receive
        self._num_bytes = 0
        self._is_whole = False

    async def receive(self) -> MutableMapping[str, Any]:
        try:
            message = await asyncio.wait_for(self._receive(), None if self._is_whole else BODY_SECONDS)
        except asyncio.TimeoutError:  # another class than TimeoutError in Python 3.10
            return {"type": "http.disconnect"}
        self._is_whole = not message.get("more_body", False)
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > MAX_BODY_BYTES:
            self.is_too_long = True
            return {"type": "http.disconnect"}
        return message


class _Replies:
    """Adds the headers; a request whose body was cut gets 413 instead of what became of it."""

    def __init__(self, send: Send, body: _LimitedBody):
        self._send = send
        self._body = body
        self._is_replaced = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if self._body.is_too_long:
                self._is_replaced = True
                await _answer(self._send, 413, f"A request may have {MAX_BODY_BYTES} bytes.")
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
        if not self._is_replaced:
            await self._send(message)


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [*_HEADERS, (b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="chat", charset="UTF-8"'))
    body = f"{text}\n".encode()
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_refusal(error: Exception) -> bool:
    """Whether an error is the framework's way of saying that it could not say 404 any more."""
    from starlette.exceptions import HTTPException

    return isinstance(error.__cause__, HTTPException)


def _password_of(authorization: str) -> str:
    """The password in a header Authorization; "" where there is none."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(credentials, validate=True).decode("utf-8").partition(":")[2]
    except ValueError:  # no base64, no ASCII, no UTF-8
        return ""
