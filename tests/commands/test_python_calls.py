"""The functions that `finetune` hands to Python: results, errors, and that nothing stays behind in the caller."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

import finetune
from finetune import RunError, UserError
from finetune.commands import python_calls
from tests.conftest import FAST, ROOT, losses, run_entry, write_arguments

POPEN = subprocess.Popen


def state() -> tuple:
    """What a call could leave behind in this process."""
    return (
        {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
        dict(os.environ),
        list(sys.argv),
        list(sys.path),
        random.getstate(),
        [each.tolist() if hasattr(each, "tolist") else each for each in np.random.get_state()],
        (logging.root.level, list(logging.root.handlers)),
        os.getcwd(),
        threading.active_count(),
    )


def test_the_names_are_there_and_cost_nothing():
    code = (
        "import sys, finetune; before = set(sys.modules); from finetune import train, predict, merge, preview, evaluate;"
        "assert callable(merge) and merge is sys.modules['finetune.merge'];"
        "assert not {'paddle', 'paddlenlp', 'numpy'} & sys.modules.keys(), sys.modules.keys() - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    assert {"train", "merge", "UserError"} <= set(dir(finetune))
    with pytest.raises(AttributeError, match="has no attribute 'tune'"):
        finetune.tune  # noqa: B018


def test_wrong_settings_are_told_without_a_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(python_calls, "_call", lambda *_: pytest.fail("a process was started"))
    before = state()
    with pytest.raises(UserError) as caught:
        finetune.train(model_name_or_path="a/b", learning_rate="abc", lora_rnk=3, output_dir=tmp_path / "out")
    assert caught.value.faults[:2] == (
        'learning_rate is "abc" in the call: a finite number is needed, for example 5e-05',
        'unknown setting "lora_rnk" in the call: did you mean "lora_rank"?',
    )
    with pytest.raises(UserError, match="model_name_or_path is an object of type object: give a text"):
        finetune.train(model_name_or_path=object())
    with pytest.raises(UserError, match=r"absent\.yaml does not exist"):
        finetune.preview("absent.yaml")
    for wrong in ({}, {"prompts": ["a"], "data_file": "b"}):
        with pytest.raises(UserError, match="one of the two"):
            finetune.predict(model_name_or_path="a", **wrong)
    with pytest.raises(UserError, match="no list of texts"):
        finetune.predict("Hello", model_name_or_path="a")
    assert finetune.predict([], model_name_or_path="a").rows == []
    assert state() == before


def test_settings_of_the_call_win_over_the_file(tmp_path, monkeypatch):
    (tmp_path / "args.yaml").write_text("lora: false  # or true\nlora_r: 4\nmax_steps: 3\n")
    seen = {}
    monkeypatch.setattr(python_calls, "_call", lambda request, show: seen.update(request) or "said")
    given = {
        "model_name_or_path": tmp_path,
        "dataset_name_or_path": ROOT / "data",
        "output_dir": tmp_path / "out",
    }
    result = finetune.train(
        tmp_path / "args.yaml", lora=True, lora_rank=2, lora_target_modules=(".*q.*",), **given
    )
    assert (result.metrics, result.log, result.best_checkpoint, result.last_checkpoint) == (
        {},
        [],
        None,
        None,
    )
    assert result.output == "said" and result.output_dir == tmp_path / "out"
    from finetune.settings.arguments import parse_arguments

    args = parse_arguments(seen["words"], overrides=seen["settings"])
    assert (args.model.lora, args.model.lora_rank, args.training.max_steps) == (True, 2, 3)
    assert args.model.lora_target_modules == [".*q.*"] and args.training.do_train is True


def test_options_become_words():
    words = python_calls._write_words({"a": Path("b"), "c": [1, "-d"], "e": True, "f": None, "g": 1e-5})
    assert words == ["--a=b", "--c=1", "--c=-d", "--e=true", "--g=1e-05"]


def stand_in(monkeypatch, code: str) -> None:
    """Has calls run some code in place of the child."""
    monkeypatch.setattr(
        python_calls.subprocess,
        "Popen",
        lambda command, **rest: POPEN([sys.executable, "-c", code, command[-1]], **rest),
    )


def test_how_a_process_failed(monkeypatch):
    stand_in(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RunError, match="ended by SIGKILL"):
        python_calls._call({}, False)
    stand_in(monkeypatch, "print('usage: x'); print('x: error: no such option'); raise SystemExit(2)")
    with pytest.raises(UserError, match=r"^no such option$"):
        python_calls._call({}, False)
    stand_in(monkeypatch, "print('first'); print('last'); raise SystemExit(1)")
    with pytest.raises(RunError, match="first\nlast"):
        python_calls._call({}, False)


def test_what_is_said_is_shown_as_it_comes(monkeypatch, capsys):
    stand_in(monkeypatch, "import sys; sys.stdout.write('50 %\\r100 %\\n'); sys.stderr.write('小桨\\n')")
    assert python_calls._call({}, True) in ("50 %\r100 %\n小桨\n", "小桨\n50 %\r100 %\n")
    assert "100 %" in capsys.readouterr().out


def test_an_interrupt_ends_the_process_too(monkeypatch, tmp_path):
    mark = tmp_path / "interrupted"
    stand_in(
        monkeypatch,
        "import time, pathlib\ntry:\n    print('ready', flush=True); time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    pathlib.Path({str(mark)!r}).touch()",
    )
    threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    previous = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # an earlier test may have set another
    try:
        with pytest.raises(KeyboardInterrupt):
            python_calls._call({}, False)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert mark.exists() and time.monotonic() - began < 30


def test_train_merge_predict(tmp_path, tiny_llama, small_data):
    settings = FAST | {
        "max_steps": 4,
        "model_name_or_path": str(tiny_llama),
        "dataset_name_or_path": str(small_data),
        "lora": True,
        "disable_tqdm": True,
    }
    before = state()
    result = finetune.train(**settings, output_dir=tmp_path / "called", show=False)
    assert state() == before
    same = write_arguments(tmp_path / "args.json", **settings, output_dir=str(tmp_path / "script"))
    assert run_entry(same) == 0
    assert losses(tmp_path / "called") == losses(tmp_path / "script") != []
    assert [row["loss"] for row in result.log if row["kind"] == "train"] == losses(tmp_path / "script")
    assert result.metrics["train_loss"] > 0 and "Trained" in result.output
    assert result.last_checkpoint is None or result.last_checkpoint.is_dir()

    merged = finetune.merge(
        lora_path=result.output_dir,
        merge_model_path=tmp_path / "merged",
        model_name_or_path=tiny_llama,
        show=False,
    )
    assert isinstance(finetune.merge, types.ModuleType) and merged == tmp_path / "merged"
    answers = finetune.predict(["Hello", "小桨"], model_name_or_path=merged, max_new_tokens=4)
    assert [row["src"] for row in answers.rows] == ["Hello", "小桨"]
    assert all(isinstance(row["output"], str) for row in answers.rows)
