"""Asks a served page for what a browser asks it for, without one; and a browser, where there is one."""

from __future__ import annotations

import http.client
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any
from urllib.request import urlopen

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")

SHORT_ANSWER: tuple[Any, ...] = (0.9, 1, 0, 1, 3, 0)
"""Temperature, top_p, top_k, repetition penalty, number of new tokens, seed: the controls of the page in their order."""


def ask(page_url: str, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer."""
    connection = http.client.HTTPConnection(page_url.removeprefix("http://"), timeout=20)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Content-Type": "application/json"} | names)
    answer = connection.getresponse()
    try:
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def stream_message(
    page_url: str, message: str, controls: Sequence[Any] = SHORT_ANSWER
) -> Iterator[dict[str, Any]]:
    """The events of a message, as they come, that is sent past the page's own limits."""
    config = json.loads(ask(page_url, "GET", "/config")[1])
    function = next(each for each in config["dependencies"] if each["api_name"] == "on_send")
    session = uuid.uuid4().hex
    data = [message, None, None, "", *controls]
    body = {"data": data, "fn_index": function["id"], "session_hash": session, "trigger_id": None}
    status, text = ask(page_url, "POST", "/gradio_api/queue/join", json.dumps(body))
    assert status == 200, text
    with closing(urlopen(f"{page_url}/gradio_api/queue/data?session_hash={session}", timeout=60)) as events:
        for line in events:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


@pytest.fixture(scope="module")
def browser():
    """A real headless Chromium."""
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(_BROWSERS)}")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
