"""Runs of the page: their state by their folder, and a real one that is started, stopped, found again and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.commands.page import run_folder
from finetune.commands.page.controller import PASSWORD, RunController, child_environment
from finetune.commands.page.run import main, parse_options
from finetune.commands.page.run_folder import RunFolder, read_log_end, read_state
from finetune.commands.page.trial import chat_options
from finetune.errors import UserError
from finetune.serving.chat import address
from tests.conftest import FAST, losses
from tests.watched_runs import is_alive, logged_steps, wait_until


def record(step, *, seconds=None, kind="train", **values):
    base = {
        "kind": kind,
        "step": step,
        "epoch": step / 25,
        "loss": 3 - step / 100,
        "tokens_per_second": 500.0,
    }
    return base | {"seconds": step * 2.0 if seconds is None else seconds} | values


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    made = RunFolder(tmp_path / "one")
    made.output.mkdir(parents=True)
    made.arguments.write_text(json.dumps({"num_train_epochs": 3}))
    made.process.write_text("{}")
    return made


def write_log(folder, *records):
    text = "".join(json.dumps(each) + "\n" for each in records)
    (folder.output / "train_log.jsonl").write_text(text)


def finish(folder):
    (folder.output / "trainer_state.json").write_text("{}")
    (folder.output / "all_results.json").write_text('{"train_steps": 75}')


def test_how_far_a_run_is(folder):
    assert read_state(folder, is_alive=True).kind == run_folder.STARTING
    write_log(folder, *map(record, range(1, 11)), {"kind": "eval", "step": 10, "eval_loss": 2.5})
    state = read_state(folder, is_alive=True)
    assert (state.kind, state.step, state.num_steps, state.loss) == (run_folder.RUNNING, 10, 75, 2.9)
    assert state.seconds_left == 130 and state.tokens_per_second == 500
    assert state.curve[0] == (1, 2.99) and len(state.curve) == 10 and state.evaluations == ((10, 2.5),)
    folder.arguments.write_text('{"max_steps": 12}')
    assert read_state(folder, is_alive=True).seconds_left == 4


def test_a_clock_that_began_again_does_not_disturb_the_time_left(folder):
    write_log(
        folder, *map(record, range(1, 6)), *[record(step, seconds=(step - 5) * 2.0) for step in range(6, 11)]
    )
    assert read_state(folder, is_alive=True).seconds_left == 130


@pytest.mark.parametrize(
    ("process", "alive", "kind"),
    [
        ({}, True, "running"),
        ({"stop_asked": True}, True, "stopping"),
        ({"stop_asked": True, "exit_code": 1}, False, "stopped"),
        ({"exit_code": 2}, False, "failed"),
        ({"exit_code": -9}, False, "failed"),
        ({}, False, "failed"),
    ],
)
def test_what_a_run_is_doing(folder, process, alive, kind):
    write_log(folder, record(1))
    folder.process.write_text(json.dumps(process))
    assert read_state(folder, is_alive=alive).kind == kind
    finish(folder)
    if not alive:
        assert read_state(folder, is_alive=False).kind == "finished"
        (folder.output / ".trained.json").write_text("{}")
        assert read_state(folder, is_alive=False).kind == kind


def test_torn_and_odd_files_do_no_harm(folder):
    folder.process.write_text("{")
    folder.arguments.write_text('{"max_steps": "x", "num_train_epochs": "y"}')
    (folder.output / "train_log.jsonl").write_text(
        '{"kind": "train", "step": 1, "loss": null, "seconds": 1}\n{"ki'
    )
    state = read_state(folder, is_alive=True)
    assert state.step == 1 and state.num_steps is None and state.loss is None and state.curve == ()


def test_the_end_of_a_log_is_shown_without_colours(folder):
    assert read_log_end(folder) == ""
    lines = "".join(f"line {number}\n" for number in range(100_000))
    folder.log.write_text(lines + "10%\r20%\r\x1b[1;31merror: \x1b[0m裙\n", encoding="utf-8")
    end = read_log_end(folder, 3)
    assert end == "line 99999\nerror: 裙" and "\n" not in read_log_end(folder, 2)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/b", ".hidden", "a" * 65, "-x", "a\n", "x."])
def test_names_that_lead_elsewhere(name, tmp_path):
    controller = RunController(tmp_path / "runs")
    for act in (lambda: controller.start(name, {}), controller.resume, controller.stop, controller.state):
        with pytest.raises((UserError, TypeError)) as caught:
            act() if act.__name__ == "<lambda>" else act(name)
        assert "cannot be the name of a run" in str(caught.value)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".page.lock"]


def test_one_page_for_a_folder(tmp_path):
    first = RunController(tmp_path)
    with pytest.raises(UserError, match=r"runs_dir .* is in use by another running process"):
        RunController(tmp_path)
    first.close()
    RunController(tmp_path).close()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        RunController(tmp_path / "file" / "x")


def test_another_process_with_the_same_id_is_not_the_run(folder):
    controller = RunController(folder.path.parent)
    folder.process.write_text(json.dumps({"pid": os.getpid()}))
    assert controller.current() is None
    with pytest.raises(UserError, match="does not run"):
        controller.stop("one")


def test_a_run_gets_no_password(monkeypatch):
    monkeypatch.setenv("FINETUNE_PAGE_PASSWORD", "a good password")
    environment = child_environment("zh")
    assert "a good password" not in environment.values() and environment["FINETUNE_LANG"] == "zh"


def test_a_run_is_started_stopped_found_again_and_resumed(tiny_llama, small_data, tmp_path):
    arguments = FAST | {
        "model_name_or_path": str(tiny_llama), "dataset_name_or_path": str(small_data), "max_steps": 400,
        "num_train_epochs": 100, "save_strategy": "steps", "save_steps": 400, "lora": True,
    }  # fmt: skip
    controller = RunController(tmp_path / "runs")
    controller.start("first", arguments)
    folder = controller.folder("first")
    pid = json.loads(folder.process.read_text())["pid"]
    assert controller.current() == "first" and controller.state("first").kind == "starting"
    for act in (lambda: controller.start("second", arguments), lambda: controller.resume("first")):
        with pytest.raises(UserError, match="one run at a time"):
            act()
    assert Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:4] == [b"-m", b"finetune", b"train"]
    wait_until(lambda: logged_steps(folder.output) > 3)

    controller.close()  # the page ends, another one is started
    other = RunController(tmp_path / "runs")
    assert is_alive(pid) and other.current() == "first" and other.state("first").kind == "running"
    other.stop("first")
    assert other.state("first").kind in ("stopping", "stopped")
    controller._children[pid].wait(60)
    state = other.state("first")
    assert state.kind == "stopped" and 0 < state.step < 400 and not is_alive(pid)
    assert list(folder.output.glob(f"checkpoint-{state.step}")), read_log_end(folder)
    with pytest.raises(UserError, match="does not run"):
        other.stop("first")
    with pytest.raises(UserError, match='there is a run "first" already'):
        other.start("first", arguments)

    folder.arguments.write_text(
        json.dumps(json.loads(folder.arguments.read_text()) | {"max_steps": state.step + 2})
    )
    other.resume("first", language="zh")
    assert other.wait("first", 120)
    done = other.state("first")
    assert (done.kind, done.step, done.exit_code) == ("finished", state.step + 2, 0), read_log_end(folder)
    assert len(losses(folder.output)) == state.step + 2 and "损失" in read_log_end(folder)
    with pytest.raises(UserError, match="is finished"):
        other.resume("first")
    assert other.names() == ["first"]


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({"lora": True}, "lora_path"),
        ({"prefix_tuning": True}, "prefix_path"),
        ({"lora": False}, "second_model"),
    ],
)
def test_the_chat_shows_before_and_after(folder, settings, own):
    (folder.output / "arguments.json").write_text(json.dumps({"model_name_or_path": "/a model"} | settings))
    options = chat_options(folder.output)
    values = vars(options.model) | {"second_model": options.second_model}
    assert str(values[own]) == str(folder.output) and values["model_name_or_path"] == "/a model"
    assert options.settings.is_greedy and options.compare
    (folder.output / "arguments.json").write_text("{}")
    with pytest.raises(UserError, match="model_name_or_path"):
        chat_options(folder.output)


def test_a_run_that_cannot_start_says_why(tmp_path):
    controller = RunController(tmp_path)
    controller.start("bad", {"do_train": True, "model_name_or_path": str(tmp_path / "absent")})
    assert controller.wait("bad", 60)
    state = controller.state("bad")
    assert (state.kind, state.exit_code) == ("failed", 2)
    assert "error: " in read_log_end(controller.folder("bad"))


def test_a_run_outlives_the_page_that_is_killed(tmp_path):
    """A page that is ended with its whole group of processes, as by Ctrl-C on a terminal."""
    code = (
        "import sys, time; from pathlib import Path; from finetune.commands.page import controller as c;"
        "c.subprocess.Popen = (lambda old: lambda words, **o: old([sys.executable, '-c', 'import time; time.sleep(30)', *words], **o))"
        "(c.subprocess.Popen); c.RunController(Path(sys.argv[1])).start('r', {}); print('up', flush=True); time.sleep(30)"
    )
    page = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True,
        env=child_environment("en"),
    )  # fmt: skip
    assert page.stdout is not None and page.stdout.readline() == b"up\n"
    os.killpg(page.pid, 9)
    page.wait(30)
    controller = RunController(tmp_path)
    assert controller.current() == "r"
    controller.stop("r")
    deadline = time.monotonic() + 20
    while controller.current() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert controller.state("r").kind == "stopped"


def test_the_options_of_the_page(monkeypatch, tmp_path):
    monkeypatch.delenv(PASSWORD.variable, raising=False)
    options = parse_options([])
    assert (options.host, options.port, options.runs_dir, options.stops_run) == (
        "127.0.0.1",
        7870,
        Path("runs"),
        False,
    )
    monkeypatch.setattr(address.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(["--host", "0.0.0.0", "--port", "70000"])
    for words in ("port is 70000", "open to everyone", "needs Gradio"):
        assert words in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing was made"
    with pytest.raises(SystemExit):
        parse_options(["--password", "x"])
