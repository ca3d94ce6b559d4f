"""A disk that takes no checkpoint: the run stops with a line, or goes on with one, and nothing half-written stays."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest

import finetune.run.final_weights
import finetune.training.run_state
from tests.conftest import FAST, ROOT, losses, run_entry, write_arguments


@pytest.fixture
def arguments(tiny_llama, small_data, tmp_path):
    """A run of four steps that saves after each, with some settings changed."""

    def write(**settings):
        base = FAST | {
            "model_name_or_path": str(tiny_llama), "dataset_name_or_path": str(small_data), "max_steps": 4,
            "output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
        }  # fmt: skip
        return write_arguments(tmp_path / "arguments.json", **(base | settings))

    return write


def fill_disk(patch, *, at_saves: tuple[int, ...], error: BaseException | None = None) -> None:
    """Some saves of the optimizer, counted from 1, find a full disk."""
    work, count = finetune.training.run_state.save_optimizer, iter(range(1, 100))
    error = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optimizer.safetensors")

    def save(*args, **kwargs):
        if next(count) in at_saves:
            raise error
        work(*args, **kwargs)

    patch.setattr(finetune.training.run_state, "save_optimizer", save)


def checkpoints(out) -> list[str]:
    return sorted(
        path.name for path in out.iterdir() if "checkpoint" in path.name or path.name.startswith("tmp")
    )


def test_a_full_disk_stops_the_run_and_loses_nothing(arguments, monkeypatch, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert run_entry(arguments(output_dir=str(whole))) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        fill_disk(patch, at_saves=(3,))
        assert run_entry(arguments()) == 1
    stderr = capsys.readouterr().err
    assert (
        "error: the checkpoint of step 3 cannot be saved (No space left on device: optimizer.safetensors: make room"
        in stderr
    )
    assert "checkpoint-2 is the last good one" in stderr and "Traceback" not in stderr
    assert checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]
    assert run_entry(arguments()) == 0
    assert losses(tmp_path / "out") == losses(whole)
    names = [path.name for path in whole.glob("model*.safetensors")]
    assert names and all(
        (whole / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names
    )


def test_a_run_may_go_on_without_a_checkpoint(arguments, monkeypatch, tmp_path, capsys):
    fill_disk(monkeypatch, at_saves=(2, 3))
    assert run_entry(arguments(on_save_error="continue")) == 0
    stderr = capsys.readouterr().err
    assert "warning: the checkpoint of step 2 cannot be saved (No space left" in stderr
    assert "Training goes on, as on_save_error says" in stderr
    assert "warning: no checkpoint of step 2, 3 was saved (No space left on device" in stderr
    assert checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-4"]


def test_other_faults_are_not_taken_for_a_full_disk(arguments, monkeypatch, tmp_path, capsys):
    fill_disk(monkeypatch, at_saves=(2,), error=ValueError("a fault of the program"))
    assert run_entry(arguments(on_save_error="continue")) == 1
    assert "ValueError: a fault of the program" in capsys.readouterr().err
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"]


def test_final_weights_that_find_no_room(arguments, monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(finetune.run.final_weights, "_move_final_files", fail)
        assert run_entry(arguments()) == 1
    stderr = capsys.readouterr().err
    assert (
        "error: the final weights cannot be saved (No space left on device: make room on that disk, or choose another one)"
        in stderr
    )
    assert "Traceback" not in stderr
    assert checkpoints(tmp_path / "out") == ["checkpoint-3", "checkpoint-4"]
    assert run_entry(arguments()) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_limit_of_file_sizes_that_the_log_reaches(arguments, tmp_path):
    """The real thing: the system refuses, in a process of its own."""
    path = arguments(save_strategy="no", max_steps=400, do_eval=False)
    run = subprocess.run(
        [sys.executable, "finetune_generation.py", str(path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, resource.RLIM_INFINITY)),
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    assert "files of this process may have 0.07 MB" in run.stderr and "Traceback" not in run.stderr
