"""lazy: the data are read by a process of its own while the model trains; killed at any moment, the run continues."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from finetune.checkpoints.folder import list_checkpoints
from finetune.data.stream.state import ARRAYS_FILE
from tests.conftest import launch, losses, read_log, run_entry
from tests.watched_runs import is_alive, logged_steps, start, wait_until

NUM_STEPS = 24  # more than two passes over 40 samples in batches of 4
KINDS = {
    "padded": {"neftune": True, "shuffle_buffer_size": 16},
    "packed": {"zero_padding": True, "shuffle_buffer_size": 12, "per_device_train_batch_size": 2},
}


@pytest.fixture(scope="module")
def prepare(write_run):
    """Writes the argument file of a run into a fresh folder."""
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": NUM_STEPS, "lazy": True}
    return lambda kind, **more: write_run(kind, **KINDS[kind] | settings | more)


@pytest.fixture(scope="module")
def uninterrupted(prepare):
    """Losses of a run without interruption, and its checkpoints."""
    found = {}

    def run(kind: str) -> tuple[list[float], Path]:
        if kind not in found:
            arguments, out = prepare(kind)
            result = launch("finetune_generation.py", arguments)
            assert result.returncode == 0, result.stderr[-3000:]
            found[kind] = losses(out), out
        return found[kind]

    return run


def children_of(process: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_run_continues_exactly_and_leaves_no_process(prepare, uninterrupted, kind):
    expected, whole = uninterrupted(kind)
    assert len(expected) == NUM_STEPS
    arguments, out = prepare(kind)
    process = start(arguments)
    wait_until(lambda: logged_steps(out) >= 13, process)
    workers = children_of(process)
    assert workers, "no process reads the data"
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(is_alive, workers)), timeout=5)
    assert logged_steps(out) < NUM_STEPS, "it was killed too late to show anything"

    result = launch("finetune_generation.py", arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Continuing from" in result.stderr
    assert losses(out) == expected  # to the last digit, and no step twice or missing
    for name in (ARRAYS_FILE, "data_position.json"):
        files = [list_checkpoints(folder)[-1] / name for folder in (whole, out)]
        contents = [file.read_bytes() for file in files]
        if name.endswith(".json"):
            contents = [json.loads(content)["stream"] for content in contents]
        assert contents[0] == contents[1]


def test_a_killed_reader_ends_the_run_with_a_reason(prepare):
    arguments, out = prepare("padded", max_steps=100_000, save_strategy="no")
    process = start(arguments)
    wait_until(lambda: logged_steps(out) >= 2, process)
    for pid in children_of(process):
        os.kill(pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the process that reads the data was ended by signal SIGKILL: most likely memory ran out" in stderr


def test_sigterm_to_the_whole_group_saves_first(prepare, uninterrupted):
    arguments, out = prepare("packed", save_steps=1000)
    process = start(arguments, start_new_session=True)
    wait_until(lambda: logged_steps(out) >= 4, process)
    workers = children_of(process)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped by signal SIGTERM after step" in stderr
    wait_until(lambda: not any(map(is_alive, workers)), timeout=5)
    assert launch("finetune_generation.py", arguments).returncode == 0
    assert losses(out) == uninterrupted("packed")[0]


def test_an_epoch_of_a_stream_has_the_samples_of_an_epoch_in_memory(prepare, small_data):
    settings = {"neftune": False, "max_steps": 1, "per_device_train_batch_size": 40, "save_strategy": "no"}
    records = []
    for lazy in (True, False):
        arguments, out = prepare("padded", **settings, lazy=lazy)
        assert run_entry(arguments) == 0
        records.append(read_log(out)[0])
    stream, memory = records
    assert stream["epoch"] == memory["epoch"] == 1
    assert stream["num_label_tokens"] == memory["num_label_tokens"]
    assert stream["loss"] == pytest.approx(memory["loss"], rel=1e-6)


def test_accumulation_does_not_change_the_curve(prepare):
    curves = []
    for size, accumulated in ((8, 1), (2, 4)):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        arguments, out = prepare("padded", **more, max_steps=6, save_strategy="no", neftune=False)
        assert run_entry(arguments) == 0
        curves.append(losses(out))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_evaluation_reads_the_dev_set_as_a_whole(prepare):
    arguments, out = prepare(
        "padded", max_steps=4, evaluation_strategy="steps", eval_steps=2, save_strategy="no"
    )
    assert run_entry(arguments, "--max_eval_samples", 5) == 0
    assert len(read_log(out, "eval")) == 2


def faulty_data(tmp_path: Path, small_data: Path, line: int) -> Path:
    lines = (small_data / "train.json").read_text(encoding="utf-8").splitlines() * 5
    lines[line - 1] = '{"src": "broken'
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("line", [3, 150])  # found before the model is loaded, and found by the reader
def test_a_faulty_line_ends_the_run_with_its_place(prepare, small_data, tmp_path, capfd, line):
    folder = faulty_data(tmp_path, small_data, line)
    arguments, out = prepare("padded", dataset_name_or_path=str(folder), max_steps=60)
    assert run_entry(arguments) == 2
    stderr = capfd.readouterr().err
    assert f"error: {folder / 'train.jsonl'}:{line}: not JSON" in stderr
    assert "Traceback" not in stderr
    assert logged_steps(out) < 60 and (line > 3) == (logged_steps(out) > 5)


def test_skipped_lines_are_told_and_counted(prepare, small_data, tmp_path, capfd):
    folder = faulty_data(tmp_path, small_data, 150)
    arguments, _ = prepare("padded", dataset_name_or_path=str(folder), max_steps=60, save_strategy="no")
    assert run_entry(arguments, "--on_bad_line", "skip") == 0
    stderr = capfd.readouterr().err
    assert f"warning: faulty lines are skipped, the first: {folder / 'train.jsonl'}:150:" in stderr
    assert "skipped: 1 faulty line" in stderr


def test_changed_data_are_not_continued_with(prepare, uninterrupted, tmp_path, small_data, capfd):
    _, whole = uninterrupted("padded")
    folder = tmp_path / "data"
    shutil.copytree(small_data, folder)
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(list_checkpoints(out)[-1], ignore_errors=False) if len(list_checkpoints(out)) > 1 else None
    with (folder / "train.json").open("a") as file:
        file.write('{"src": "a", "tgt": "b"}\n')
    (out / "trainer_state.json").unlink()
    arguments, _ = prepare("padded", dataset_name_or_path=str(folder), output_dir=str(out))
    assert run_entry(arguments) == 2
    assert "other data files (changed or new: train.json" in capfd.readouterr().err
