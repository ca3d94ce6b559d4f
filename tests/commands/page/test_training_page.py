"""The training page itself: served by the command, and used in a real headless Chromium where there is one."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.commands.page.controller import RunController
from tests.serving.chat.page_client import ask, browser
from tests.serving.chat.page_process import served
from tests.watched_runs import is_alive

pytest.importorskip("gradio", reason="the page is an extra")
pytestmark = pytest.mark.slow
__all__ = ["browser"]
_STEPS = 300


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """The page as a process; it must end in silence."""
    command = [
        sys.executable,
        "-m",
        "finetune",
        "page",
        "--port",
        "0",
        "--runs_dir",
        str(folder / "runs"),
        *options,
    ]
    with served(command, errors_file=folder / "errors", cwd=folder, end_seconds=60) as url:
        yield url


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_llama, small_data) -> Path:
    """A folder with a model and data in it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "model").symlink_to(tiny_llama)
    (folder / "texts").symlink_to(small_data)
    return folder


@pytest.fixture
def page_url(home) -> Iterator[str]:
    with serving(home) as url:
        yield url


@contextmanager
def opened(browser, url: str, *, locale: str = "en-US", width: int = 1280):
    """A tab that must ask nobody else for anything."""
    tab = browser.new_page(locale=locale, viewport={"width": width, "height": 900})
    tab.set_default_timeout(60_000)
    addresses: list[str] = []
    tab.on("request", lambda request: addresses.append(request.url))
    tab.goto(url)
    tab.get_by_role("button", name="中文" if locale == "en-US" else "English").wait_for()
    tab.wait_for_function("document.querySelector('#run_name textarea, #run_name input').value")
    yield tab
    tab.close()
    assert [each for each in addresses if not each.startswith((url, "data:", "blob:"))] == []


def choose(tab, home: Path) -> None:
    """Types the folders in; those that are links are not offered."""
    for name, folder in (("model_folder", "model"), ("data_path", "texts")):
        tab.locator(f"#{name} input").fill(str(home / folder))
        tab.locator(f"#{name} input").press("Enter")


def set_value(tab, name: str, value: object) -> None:
    if not tab.locator(f"#{name}").is_visible():
        tab.locator("#run_settings > button").click()
    tab.locator(f"#{name} input, #{name} textarea").first.fill(str(value))


def state(tab, words: str) -> None:
    tab.locator("#state").get_by_text(words).wait_for()


def test_a_beginner_trains_stops_goes_on_and_talks(browser, home):
    with serving(home) as url, opened(browser, url) as tab:
        choose(tab, home)
        tab.get_by_role("button", name="Look at both").click()
        tab.locator("#findings").get_by_text("40 records, answers to learn").wait_for()
        tab.get_by_role("button", name="Preview of the data").click()
        tab.locator("#shown mark").first.wait_for()
        tab.get_by_role("button", name="Plan: memory and time").click()
        tab.locator("#shown").get_by_text("Parameters:").wait_for()
        set_value(tab, "num_train_epochs", _STEPS // 10)
        set_value(tab, "gradient_accumulation_steps", 1)
        set_value(tab, "run_name", "first")
        tab.get_by_role("button", name="Start training").click()
        tab.locator("#state").wait_for(state="visible")  # the page has gone to the next tab
        state(tab, "Training")
        tab.locator("#curve svg").wait_for()
        tab.locator("#log").get_by_text("loss").first.wait_for()
        assert re.search(
            rf"Step \d+ / {_STEPS}\b.*tokens/s.*Time left", tab.locator("#state").inner_text(), re.DOTALL
        )
    folder = home / "runs" / "first"
    assert is_alive(json.loads((folder / "process.json").read_text())["pid"]), "it ended with the page"
    with serving(home) as url:
        with opened(browser, url) as tab:
            tab.get_by_role("tab", name="2 Train").click()
            state(tab, "Training")
            tab.get_by_role("button", name="Stop (saves first)").click()
            state(tab, "Stopped, can go on")
            assert list((folder / "output").glob("checkpoint-*"))
            arguments = json.loads((folder / "argument.json").read_text())
            (folder / "argument.json").write_text(json.dumps(arguments | {"max_steps": _STEPS // 2}))
            tab.get_by_role("button", name="Go on").click()
        with opened(browser, url, locale="zh-CN", width=390) as tab:
            tab.get_by_role("tab", name="2 训练").click()
            state(tab, "已完成")
            talk(tab)
            assert tab.evaluate("document.documentElement.scrollWidth") == 390, "wider than the phone"


def talk(tab) -> None:
    """Both models answer."""
    tab.get_by_role("tab", name="3 试用").click()
    tab.get_by_role("button", name="载入微调前后的模型").click()
    tab.locator("#loaded").get_by_text("first").wait_for()
    assert "微调后: first" in tab.locator("#answers1").inner_text()
    tab.locator("#message textarea").fill("类型#裙")
    tab.locator("#message textarea").press("Enter")
    for number in (0, 1):
        tab.wait_for_function(
            f"document.querySelector('#answers{number} [data-testid=bot]')?.innerText.trim().length > 3"
        )
    tab.get_by_role("button", name="释放内存").click()
    tab.locator("#loaded").get_by_text("没有载入模型").wait_for()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("run_name", "../x", "cannot be the name of a run"),
        ("learning_rate", "much", 'learning_rate is "much"'),
        ("model_folder", "/nowhere", "model /nowhere is no folder"),
        ("model_folder", "/<b>bold</b><img src=x>", "model /<b>bold</b><img src=x> is no folder"),
    ],
)
def test_faults_are_told_and_nothing_starts(browser, home, page_url, name, value, words):
    with opened(browser, page_url) as tab:
        choose(tab, home)
        set_value(tab, name, value)
        tab.get_by_role("button", name="Start training").click()
        tab.locator("[data-testid=toast-body]").get_by_text(words).wait_for()
    assert not [each for each in (home / "runs").iterdir() if each.name not in ("first", ".page.lock")]


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_a_phone_is_wide_enough(browser, page_url, locale):
    with opened(browser, page_url, locale=locale, width=390) as tab:
        for number in range(3):
            tab.get_by_role("tab").nth(number).click()
            time.sleep(0.3)
            assert tab.evaluate("document.documentElement.scrollWidth") == 390


def test_the_method_chooses_the_file(browser, page_url):
    with opened(browser, page_url) as tab:
        tab.locator("#method").get_by_text("DPO").click()
        tab.wait_for_function("document.querySelector('#argument_file input').value === 'llama/dpo'")
        tab.get_by_role("button", name="中文").click()
        tab.get_by_role("button", name="开始训练").wait_for()
        assert tab.locator("#argument_file input").input_value() == "llama/dpo"


def test_what_is_not_the_page_s_own_is_refused(page_url):
    assert ask(page_url, "GET", "/", Host="evil.example")[0] == 403
    assert ask(page_url, "POST", "/gradio_api/queue/join", "{}", Origin="http://evil.example")[0] == 403
    assert ask(page_url, "POST", "/gradio_api/call/on_start", "{}")[0] == 404
    assert ask(page_url, "GET", "/gradio_api/file=/etc/passwd")[0] == 404
    assert ask(page_url, "GET", "/")[0] == 200


def test_a_run_ends_with_the_page_where_that_was_asked_for(tmp_path, tiny_llama, small_data):
    controller = RunController(tmp_path / "runs")
    arguments = {"do_train": True, "device": "cpu", "lora": True, "max_steps": 10_000, "logging_steps": 1,
                 "model_name_or_path": str(tiny_llama), "dataset_name_or_path": str(small_data)}  # fmt: skip
    controller.start("one", arguments)
    controller.close()
    deadline = time.monotonic() + 90
    while controller.state("one").kind == "starting" and time.monotonic() < deadline:
        time.sleep(0.2)
    with serving(tmp_path, "--stop_run_with_page") as url:
        assert ask(url, "GET", "/")[0] == 200
    assert controller.state("one").kind == "stopped"
