"""The page itself: served, and used in a real headless Chromium where there is one."""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from urllib.request import urlopen

import pytest

from finetune.errors import UserError
from tests.serving.chat.page_client import ask, browser, stream_message
from tests.serving.chat.page_process import served
from tests.serving.export.builders import build_sharp
from tests.serving.predict.builders import save_lora

pytest.importorskip("gradio", reason="the chat page is an extra")
pytestmark = pytest.mark.slow
_OPEN: list[socket.socket] = []
__all__ = ["browser"]


@pytest.fixture(scope="module")
def page_url(tmp_path_factory) -> Iterator[str]:
    """A tiny model with and without LoRA, served by the command."""
    folder = tmp_path_factory.mktemp("chat")
    model = build_sharp("llama", folder / "model", num_layers=8)
    adapter = save_lora(model, folder / "adapter")
    command = [
        sys.executable, "-m", "finetune.chat", "--model_name_or_path", str(model), "--lora_path", str(adapter),
        "--port", "0", "--chat_template", "chatglm2", "--temperature", "0.9", "--device", "cpu", "--min_new_tokens", "80",
    ]  # fmt: skip
    with served(command, errors_file=folder / "errors") as url:
        yield url


@pytest.fixture
def tab(browser, page_url):
    opened = browser.new_page(locale="en-US")
    opened.set_default_timeout(30_000)
    addresses: list[str] = []
    opened.on("request", lambda request: addresses.append(request.url))
    opened.goto(page_url)
    opened.get_by_role("button", name="Send").wait_for()
    opened.get_by_role("button", name="中文").wait_for()  # the page has asked for its language
    yield opened
    opened.close()
    outside = [url for url in addresses if not url.startswith((page_url, "data:", "blob:"))]
    assert outside == []


_NOTE_CHANGES = """() => {
    window.seen = [], window.before = [0, 0], window.atOnce = false;
    const note = () => {
        const found = document.querySelectorAll("#answers1 [data-testid=bot]");
        const text = found.length ? found[found.length - 1].innerText.trim() : "";
        if (text && window.seen.at(-1) !== text) window.seen.push(text);
        const first = document.querySelector("#answers0 [data-testid=bot]")?.innerText.trim() || "";
        const lengths = [first.length, text.length, window.before[0], window.before[1]];
        if (lengths[0] > lengths[2] && lengths[2] && lengths[3]) window.atOnce = true;  // it went on, the other had begun
        window.before = [first.length, text.length];
    };
    new MutationObserver(note).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def answers(tab, number: int) -> list[str]:
    return tab.locator(f"#answers{number} [data-testid=bot]").all_inner_texts()


def write(tab, text: str, *, tokens: int) -> None:
    if not tab.locator("#max_new_tokens").is_visible():
        tab.locator("#settings > button").click()
    tab.locator("#max_new_tokens input[type=number]").fill(str(tokens))
    tab.locator("#max_new_tokens input[type=number]").press("Enter")
    tab.locator("#message textarea").fill(text)
    tab.locator("#message textarea").press("Enter")


def settle(tab, count: int = 1) -> None:
    """Waits until both columns have so many answers that no longer change."""
    deadline, before, since = time.monotonic() + 90, None, time.monotonic()
    while time.monotonic() < deadline:
        now = (answers(tab, 0), answers(tab, 1))
        if now != before:
            before, since = now, time.monotonic()
        if (
            all(len(column) == count and column[-1].strip() for column in now)
            and time.monotonic() - since > 1.5
        ):
            return
        time.sleep(0.1)
    raise AssertionError(f"the answers do not come to an end: {before}")


def test_two_answers_stream_side_by_side_and_are_remembered(tab):
    tab.evaluate(_NOTE_CHANGES)
    write(tab, "类型#上衣*颜色#白色*", tokens=100)
    settle(tab)
    seen = tab.evaluate("window.seen")
    assert tab.evaluate("window.atOnce"), "one waited for the other"
    assert len(seen) > 5, "the answer came at once"
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    left, right = answers(tab, 0)[-1], answers(tab, 1)[-1]
    assert left != right and left.strip() and right.strip()
    assert "类型#上衣*颜色#白色*" in tab.locator("#answers0 [data-testid=user]").inner_text()
    write(tab, "裙", tokens=10)
    settle(tab, 2)
    tab.get_by_role("button", name="New conversation").click()
    tab.wait_for_function("!document.querySelector('#answers0 [data-testid=bot]')")


def test_stop_ends_an_answer(tab):
    write(tab, "裙", tokens=200)
    tab.wait_for_function(
        "document.querySelector('#answers0 [data-testid=bot]')?.innerText.trim().length > 3"
    )
    tab.get_by_role("button", name="Stop").click()
    time.sleep(1)
    left, right = answers(tab, 0), answers(tab, 1)
    time.sleep(1.5)
    assert (answers(tab, 0), answers(tab, 1)) == (left, right)
    assert left[-1].strip() and right[-1].strip(), "both answer at once"


def test_the_language_can_be_switched(tab):
    tab.get_by_role("button", name="中文").click()
    tab.get_by_role("button", name="发送").wait_for()
    assert "微调前" in tab.locator("#answers0").inner_text()
    tab.get_by_role("button", name="English").click()
    tab.get_by_role("button", name="Send").wait_for()


def test_a_setting_out_of_range_is_told(tab):
    tab.locator("#settings > button").click()
    tab.locator("#seed input").fill("-1")
    tab.locator("#seed input").press("Tab")
    tab.locator("#message textarea").fill("裙")
    tab.locator("#message textarea").press("Enter")
    tab.get_by_text("seed").first.wait_for()
    tab.locator("[data-testid=toast-body]").wait_for()
    assert tab.locator("#message textarea").input_value() == "裙"


def test_the_page_forbids_anything_from_elsewhere(page_url):
    with urlopen(page_url) as response:
        policy, text = response.headers["Content-Security-Policy"], response.read().decode()
    assert "default-src 'self'" in policy and "http" not in policy
    assert not re.search(r"<(?:script|link)[^>]+https?://(?!127\.0\.0\.1)", text)


def send_message(page_url, message: str) -> str:
    """The events of a message, as text."""
    return "\n".join(json.dumps(event, ensure_ascii=False) for event in stream_message(page_url, message))


def test_nothing_can_be_uploaded_and_no_other_address_be_asked(page_url):
    form = "--x\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\nhi\r\n--x--\r\n"
    kind = {"Content_Type": "multipart/form-data; boundary=x"}
    assert ask(page_url, "POST", "/gradio_api/upload", form, **kind)[0] == 404
    assert ask(page_url, "GET", "/gradio_api/file=/etc/passwd")[0] == 404
    assert ask(page_url, "GET", "/gradio_api/proxy=http://127.0.0.1")[0] == 404


def test_another_name_and_another_page_are_refused(page_url):
    assert ask(page_url, "GET", "/", Host="evil.example")[0] == 403
    assert ask(page_url, "POST", "/gradio_api/queue/join", "{}", Origin="http://evil.example")[0] == 403
    assert ask(page_url, "GET", "/", Host="localhost:1")[0] == 200


def test_requests_have_a_largest_size(page_url):
    assert ask(page_url, "POST", "/gradio_api/queue/join", "x" * 300_000)[0] == 413


def test_texts_and_numbers_past_the_limits_are_told(page_url):
    assert '"success": true' in send_message(page_url, "hello")
    too_long = send_message(page_url, "x" * 40_001)
    assert "Message: 40001 characters, but at most 40000 are taken" in too_long


def test_values_that_are_no_numbers_are_told_in_the_language_of_the_page():
    from finetune.serving.chat.page import ChatPage
    from finetune.serving.decoding.settings import DecodingSettings

    page = ChatPage([], DecodingSettings()).panel
    for value in ("many", float("inf"), float("nan"), [1]):
        with pytest.raises(UserError, match=r"Seed: .* is no number"):
            next(page.send("x", [], None, 0.9, 1, 0, 1, 3, value))
    with pytest.raises(UserError, match="消息：共 40001 个字符"):
        next(page.send("x" * 40_001, [], None, 0.9, 1, 0, 1, 3, 0, language="zh"))
    with pytest.raises(UserError, match="200 turns"):
        next(page.send("x", [[("a", "b")] * 200], None, 0.9, 1, 0, 1, 3, 0))


@pytest.fixture
def locked_url() -> Iterator[str]:
    """A page without models, behind a password."""
    import uvicorn

    from finetune.serving.chat.guard import Access
    from finetune.serving.chat.page import ChatPage, build_app
    from finetune.serving.decoding.settings import DecodingSettings

    app = build_app(ChatPage([], DecodingSettings()), Access(password="a good password"))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_nothing_of_the_page_is_seen_without_the_password(locked_url):
    given = {"Authorization": "Basic " + base64.b64encode(b"anyone:a good password").decode()}
    status, text = ask(locked_url, "GET", "/", **given)
    files = [path.lstrip(".") for path in re.findall(r'(?:src|href)="(\.?/[^"]+)"', text)]
    assert status == 200 and len(files) >= 2
    for path in ["/", "/config", "/gradio_api/info", *files]:
        assert ask(locked_url, "GET", path, **given)[0] == 200, path
        assert ask(locked_url, "GET", path)[0] == 401, path
    assert ask(locked_url, "POST", "/gradio_api/queue/join", "{}")[0] == 401


def test_connections_that_say_nothing_do_not_keep_others_out(page_url):
    host, port = page_url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port)), timeout=5) for _ in range(200)]
    try:
        assert ask(page_url, "GET", "/config")[0] == 200
        silent[0].settimeout(30)
        assert silent[0].recv(1) == b"", "closed after some seconds"
    finally:
        for one in silent:
            one.close()


def test_the_page_ends_in_silence_while_browsers_are_connected(page_url):
    """The end itself is looked at where `page_url` ends the process."""
    host, port = page_url.removeprefix("http://").split(":")
    for path in ("heartbeat/abc", "queue/data?session_hash=abc"):
        connection = socket.create_connection((host, int(port)), timeout=5)
        connection.sendall(f"GET /gradio_api/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
        _OPEN.append(connection)
