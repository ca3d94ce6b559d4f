"""Memory that runs out is told in a line that names the limit, and a limit that is too small before anything is loaded."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time

import pytest

from finetune.errors import UserError
from finetune.machine.memory_limit import GIBIBYTE, check_address_space, describe_memory_failure
from finetune.processes.command import run_command
from tests.conftest import ROOT

SCRIPTS = (
    "finetune_generation.py",
    "export_model.py",
    "predict_generation.py",
    "merge_lora_params.py",
    "merge_tp_params.py",
)
OPTIONS = {
    "finetune_generation.py": [
        *("--model_name_or_path", "m", "--dataset_name_or_path", str(ROOT / "data")),
        *("--output_dir", "o", "--do_train", "true", "--device", "cpu"),
    ],
    "export_model.py": ["--model_name_or_path", "m", "--output_path", "o"],
    "predict_generation.py": ["--model_name_or_path", "m"],
}


def set_limit(monkeypatch, number: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (number, resource.RLIM_INFINITY))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory: free"),
        (MemoryError("Unable to allocate 3 GiB"), "not enough memory (Unable to allocate 3 GiB): free"),
        (RuntimeError("std::bad_alloc"), "(std::bad_alloc)"),
        (
            RuntimeError(
                "\n\n----\nC++ Traceback\n----\n(ResourceExhausted) Fail to alloc memory of 8 size."
            ),
            "((ResourceExhausted) Fail to alloc memory of 8 size.)",
        ),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "(Cannot allocate memory)"),
        (ImportError("libphi_core.so: failed to map segment from shared object"), "(libphi_core.so: failed"),
        (RuntimeError("can't start new thread"), "(can't start new thread)"),
        (caused(ValueError("no batch"), MemoryError()), "not enough memory: free"),
    ],
)
def test_every_library_has_its_words_for_it(error, said):
    assert said in (describe_memory_failure(error) or "").replace("[Errno 12] ", "")


@pytest.mark.parametrize(
    "error",
    [ValueError("bad_alloc"), OSError(errno.ENOSPC, "No space"), ImportError("no module"), KeyError()],
)
def test_other_faults_are_none_of_memory(error):
    assert describe_memory_failure(error) is None


def test_a_limit_is_named(monkeypatch, capsys):
    set_limit(monkeypatch, 3 * GIBIBYTE)

    def run_out():
        raise RuntimeError("(ResourceExhausted) Fail to alloc memory")

    assert run_command(run_out) == 1
    told = capsys.readouterr().err
    assert "limited to 3.00 GiB (ulimit -v): raise that limit, free memory" in told and told.count("\n") == 1


def test_a_limit_below_what_paddle_needs_is_refused(monkeypatch):
    check_address_space()
    set_limit(monkeypatch, GIBIBYTE)
    with pytest.raises(
        UserError, match=r"limited to 1\.00 GiB \(ulimit -v\), but Paddle alone needs 2\.00 GiB"
    ):
        check_address_space()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("mebibytes", [48, 100, 1000])
def test_every_command_says_so_at_once(script, mebibytes, tmp_path):
    """Without the look at the limit, imports fail with tracebacks, abort, or spin for ever."""
    if mebibytes == 1000 and script not in OPTIONS:
        pytest.skip("a merge needs no Paddle")

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20, mebibytes << 20))

    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *OPTIONS.get(script, [])],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, preexec_fn=limit,
    )  # fmt: skip
    assert result.returncode == 2 and time.monotonic() - began < 20
    assert result.stderr.count("\n") == 1 and "(ulimit -v)" in result.stderr, result.stderr
