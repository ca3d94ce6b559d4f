"""What the chat page lets through, asked of the guard alone: no Gradio, no socket."""

from __future__ import annotations

import asyncio
import base64

import pytest

from finetune.serving.chat import guard
from finetune.serving.chat.guard import Access, Guard
from finetune.serving.web import attempts
from finetune.serving.web.hosts import own_names

JOIN = "/gradio_api/queue/join"


async def _echo(scope, receive, send):
    """Answers 200 with the body that it read."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body, more = body + message["body"], message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def ask(
    guarded, method="GET", path="/", *, host="127.0.0.1:7860", address="127.0.0.1", parts=(b"",), **headers
):
    """Status and headers of the answer."""
    waiting = [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]
    sent = []

    async def receive():
        return waiting.pop(0) if waiting else await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    pairs = [(b"host", host.encode())]
    pairs += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs, "client": (address, 5)}
    asyncio.run(guarded(scope, receive, send))
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert len(starts) == 1
    return starts[0]["status"], dict(starts[0]["headers"])


def basic(password: str, user: str = "me") -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def page():
    return Guard(_echo, Access())


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/assets/index-B_1.js", "/static/fonts/x.woff2", "/gradio_api/queue/data"]
)  # fmt: skip
def test_what_the_page_asks_for_passes(page, path):
    status, headers = ask(page, path=path)
    assert status == 200
    assert b"frame-ancestors 'none'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    "path", [JOIN, "/gradio_api/run/on_stop", "/gradio_api/cancel", "/gradio_api/reset/"]
)
def test_what_the_page_sends_passes(page, path):
    assert ask(page, "POST", path, parts=(b"{}",), origin="http://127.0.0.1:7860")[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("POST", "/upload"),
        ("GET", "/gradio_api/upload_progress"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://example.com"),
        ("POST", "/gradio_api/call/on_send"),
        ("POST", "/gradio_api/api/on_send"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/process_recording"),
        ("GET", "/monitoring"),
        ("GET", "/assets/../config"),
        ("GET", "/assets/%2e%2e/x"),
        ("GET", "/config\n"),
        ("PUT", "/"),
        ("DELETE", JOIN),
        ("OPTIONS", JOIN),
        ("GET", "/gradio_api/deep_link"),
    ],
)
def test_everything_else_is_closed(page, method, path):
    assert ask(page, method, path)[0] == 404


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:7860", "127.0.0.1", "[::1]:7860", "192.168.1.5:80", "localhost."]
)
def test_addresses_and_own_names_are_hosts(page, host):
    assert ask(page, host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "", "a@localhost"]
)  # fmt: skip
def test_a_name_that_resolves_to_us_is_no_host(page, host):
    assert ask(page, host=host)[0] == 403
    assert ask(page, "POST", JOIN, host=host)[0] == 403


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost.evil.example:7860", "x", "http://[::1"]
)
def test_another_page_in_the_browser_is_refused(page, origin):
    assert ask(page, "POST", JOIN, origin=origin)[0] == 403
    assert ask(page, "POST", JOIN, sec_fetch_site="cross-site")[0] == 403
    assert ask(page, sec_fetch_site="cross-site")[0] == 200, "a link to the page may be followed"


def test_names_can_be_added():
    names = own_names("0.0.0.0", ["Chat.Example"])
    assert {"localhost", "chat.example"} < names and own_names("127.0.0.1") == {"localhost", "127.0.0.1"}
    assert ask(Guard(_echo, Access(names)), host="chat.example:443")[0] == 200


def test_a_body_is_as_long_as_it_may_be(page, monkeypatch):
    monkeypatch.setattr(guard, "POSTS_PER_MINUTE", 10**6)
    limit = guard.MAX_BODY_BYTES
    assert ask(page, "POST", JOIN, parts=(b"x" * limit,), content_length=str(limit))[0] == 200
    for length in (str(limit + 1), "9" * 400, "-1", "x", ""):
        assert ask(page, "POST", JOIN, content_length=length)[0] == 413
    assert ask(page, "POST", JOIN, parts=(b"x" * limit, b"x"))[0] == 413, "no length was said"


def test_a_body_that_does_not_come_is_given_up(page, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)
    assert (
        ask(page, "POST", JOIN, parts=())[0] == 200
    )  # the echo of nothing: it was told that the browser has gone


def test_an_address_may_send_so_many_requests_a_minute(page, monkeypatch):
    for _ in range(guard.POSTS_PER_MINUTE):
        assert ask(page, "POST", JOIN)[0] == 200
    assert ask(page, "POST", JOIN)[0] == 429
    assert ask(page)[0] == 200 and ask(page, "POST", JOIN, address="10.0.0.7")[0] == 200
    later = attempts.time.monotonic() + 61
    monkeypatch.setattr(attempts.time, "monotonic", lambda: later)
    assert ask(page, "POST", JOIN)[0] == 200


def test_the_password_is_asked_for_and_not_to_be_tried_out():
    page = Guard(_echo, Access(password="correct horse é"))
    status, headers = ask(page)
    assert status == 401 and headers[b"www-authenticate"].startswith(b"Basic")
    for given in (
        basic("correct horse é"),
        basic("correct horse é", ""),
        basic("correct horse é", "someone:x"[:7]),
    ):
        assert ask(page, authorization=given)[0] == 200
    for wrong in (
        "Basic",
        "Basic !!!",
        "Basic " + base64.b64encode(b"\xff:\xff").decode(),
        "Bearer x",
        basic(""),
    ):
        assert ask(page, authorization=wrong)[0] == 401
    for _ in range(guard.FAILURES_PER_MINUTE):
        ask(page, authorization=basic("guess"))
    assert ask(page, authorization=basic("correct horse é"))[0] == 429
    assert ask(page, authorization=basic("correct horse é"), address="10.0.0.7")[0] == 200
    assert "correct" not in repr(Access(password="correct horse é"))


def test_a_password_in_no_known_form_is_a_wrong_one():
    page = Guard(_echo, Access(password="secret"))
    for given in ("Basic \u00ff", "Basic A", "Basic /w==", "Bearer x"):
        assert ask(page, authorization=given)[0] == 401


def test_websockets_are_closed(page):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(page({"type": "websocket"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
