"""The log file: exact figures, valid JSON, and one uninterrupted story after a kill."""

import json
import logging
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from finetune.reporting import run_log
from finetune.reporting.memory import peak_resident_bytes
from finetune.reporting.run_log import RunLog, TrainRecord, read_log
from finetune.storage.files import write_atomically


def train_record(step, loss=2.5):
    return TrainRecord(
        step=step,
        epoch=step / 10,
        loss=loss,
        learning_rate=3e-5,
        grad_norm=1.25,
        num_tokens=1000,
        num_label_tokens=400,
        tokens_per_second=3940.2,
        seconds=step * 0.25,
        memory_bytes=123456789,
    )


def steps(path):
    return [(record["kind"], record["step"]) for record in read_log(path)]


def test_floats_keep_every_digit(tmp_path):
    log = RunLog(tmp_path / "new" / "train_log.jsonl", None)
    loss = 0.1 + 0.2
    log.step(train_record(1, loss))
    log.step(train_record(2, np.float32(2.3)))
    log.evaluation({"step": 2, "epoch": 0.2, "eval_loss": 1 / 3})
    lines = log.path.read_text().splitlines()
    assert '"loss": 0.30000000000000004' in lines[0]
    assert json.loads(lines[1])["loss"] == float(np.float32(2.3))
    assert read_log(log.path)[0] == {"kind": "train", **train_record(1, loss)}
    assert read_log(log.path)[2] == {"kind": "eval", "step": 2, "epoch": 0.2, "eval_loss": 1 / 3}


def test_lines_are_in_the_file_at_once(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", None)
    log.step(train_record(1))
    assert steps(log.path) == [("train", 1)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_json_lacks_is_null(tmp_path, value):
    log = RunLog(tmp_path / "log.jsonl", None)
    log.step({"step": 1, "grad_norm": value, "norms": [value]})
    text = log.path.read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record == {"kind": "train", "step": 1, "grad_norm": None, "norms": [None]}


def write_run(path, last_step):
    log = RunLog(path, None)
    for step in range(1, last_step + 1):
        log.step(train_record(step))
        if step % 2 == 0:
            log.evaluation({"step": step, "eval_loss": 1.0})
    log.close()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    write_run(path, 5)
    log = RunLog(path, 2)
    assert steps(path) == [("train", 1), ("train", 2), ("eval", 2)]
    log.step(train_record(3))
    assert steps(path)[-1] == ("train", 3)
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_run_starts_an_empty_log(tmp_path):
    path = tmp_path / "log.jsonl"
    write_run(path, 3)
    RunLog(path, None)
    assert path.read_text() == ""


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_torn_last_line_is_dropped(tmp_path, cut, caplog):
    path = tmp_path / "log.jsonl"
    write_run(path, 3)
    path.write_bytes(path.read_bytes()[: -cut - 1])
    with caplog.at_level(logging.WARNING):
        assert steps(path) == [("train", 1), ("train", 2), ("eval", 2)]
    assert caplog.text == ""
    RunLog(path, 3).step(train_record(3))
    assert steps(path) == [("train", 1), ("train", 2), ("eval", 2), ("train", 3)]


def test_a_line_cut_at_its_newline_alone_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    write_run(path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    RunLog(path, 1).step(train_record(2))
    assert steps(path) == [("train", 1), ("train", 2)]


@pytest.mark.parametrize("bad", [b"{oops", b"\x00\x00", b"\xff\xfe", b"17"])
def test_another_unreadable_line_is_left_out_with_a_warning(tmp_path, bad, caplog):
    path = tmp_path / "log.jsonl"
    write_run(path, 1)
    path.write_bytes(bad + b"\n" + path.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert steps(path) == [("train", 1)]
    assert f"{path}:1 is no record" in caplog.text


def test_a_missing_log_reads_as_empty(tmp_path):
    assert read_log(tmp_path / "none.jsonl") == []
    RunLog(tmp_path / "none.jsonl", 7).step(train_record(8))
    assert steps(tmp_path / "none.jsonl") == [("train", 8)]


def test_a_kill_leaves_whole_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    script = (
        "import itertools, sys\n"
        "from finetune.reporting.run_log import RunLog\n"
        "log = RunLog(sys.argv[1], None)\n"
        "for step in itertools.count(1):\n"
        "    log.step({'step': step, 'loss': step / 3})\n"
        "    step == 200 and print('go', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    process.stdout.close()
    found = [step for _, step in steps(path)]
    assert len(found) >= 200 and found == list(range(1, len(found) + 1))


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def no_space(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(run_log.os, "fsync", no_space)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"


def test_peak_memory_grows_with_what_is_used():
    before = peak_resident_bytes()
    block = np.ones(200_000_000 // 8)
    assert peak_resident_bytes() - before > 50_000_000 or before > 400_000_000
    assert block[0] == 1 and 10_000_000 < before < 1 << 40
