"""How a command ends: what a user, a file, a disk or a parser did is told in a line; a fault of the program shows itself."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from finetune.errors import RunError, UserError
from finetune.processes.command import run_command
from tests.conftest import ROOT, launch


def raising(error):
    def main():
        raise error

    return main


def os_error(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


ENDS = [
    (UserError(["first", "second"]), 2, "error: first\nerror: second\n"),
    (RunError("what happened: what to do"), 1, "error: what happened: what to do\n"),
    (
        os_error(errno.ENOSPC, "out/model.safetensors"),
        1,
        "error: out/model.safetensors: No space left on device: make room on that disk, or choose another one\n",
    ),
    (
        os_error(errno.EACCES, "weights"),
        2,
        "error: weights: Permission denied: allow this user to use it, or choose another place\n",
    ),
    (os_error(errno.EROFS, "out"), 1, "error: out: Read-only file system: choose a place that may be written to\n"),
    (
        os_error(errno.EMFILE, "a"),
        1,
        "error: a: Too many open files: raise the limit of open files (ulimit -n)\n",
    ),
    (os_error(errno.EIO), 1, "error: the operating system: Input/output error: check the disk and its connection\n"),
    (
        OSError("a library's own words"),
        1,
        "error: the operating system: a library's own words: check the file and the disk it lies on\n",
    ),
    (os_error(errno.ENAMETOOLONG, "n" * 5000), 2, "File name too long: choose a shorter path\n"),
    (
        os_error(errno.EXDEV, "a", None, "b"),
        1,
        "error: a -> b: Invalid cross-device link: check the file and the disk it lies on\n",
    ),
    (MemoryError(), 1, "error: not enough memory: free memory, or take less at once, such as a smaller batch\n"),
    (zipfile.BadZipFile("no directory"), 1, "error: a file is damaged (no directory): copy the files again\n"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "text"), ENDS, ids=lambda value: type(value).__name__)
def test_what_is_raised_decides_about_the_end(error, code, text, capsys):
    assert run_command(raising(error)) == code
    stderr = capsys.readouterr().err
    assert stderr == text or (len(stderr) < 400 and stderr.endswith(text))


@pytest.mark.parametrize(
    ("act", "code", "message"),
    [
        (lambda: json.loads("{"), 1, r"a file is no valid JSON"),
        (lambda: json.loads("[" * 100_000), 1, "nested too deep to be read"),
        (lambda: b"\xff".decode(), 1, "bytes that are no text"),
        (lambda: "\ud800".encode(), 1, r"a text holds \ud800, which utf-8 cannot write"),
        (lambda: struct.unpack("<Q", b""), 1, "a binary file is cut short"),
        (lambda: int(float("inf")), 1, "a number is too large"),
        (lambda: bytearray(2**62), 1, "not enough memory"),
        (lambda: Path("a\0b").stat(), 2, "a path holds a null character: correct it"),
        (lambda: open("a\0b"), 2, "a path holds a null character: correct it"),  # noqa: SIM115
        (lambda: Path("a" * 5000).stat(), 2, "File name too long"),
        (lambda: input(), 1, "ends too early"),
    ],
)
def test_what_the_machine_says_is_told_in_one_line(act, code, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    assert run_command(act) == code
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RuntimeError("x"), AssertionError()])
def test_a_fault_of_the_program_keeps_its_traceback(error, capsys):
    assert run_command(raising(error)) == 1
    assert "Traceback" in capsys.readouterr().err


def test_who_wants_the_traceback_gets_it(capsys, monkeypatch):
    monkeypatch.setenv("FINETUNE_VERBOSE", "1")
    assert run_command(raising(os_error(errno.EACCES, "a"))) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr and stderr.endswith("or choose another place\n")


def test_a_number_that_is_returned_is_the_exit_code():
    assert (run_command(lambda: None), run_command(lambda: 3)) == (0, 3)


COMMANDS = {
    "finetune_generation.py": ["{path}/arguments.json"],
    "merge_lora_params.py": ["--lora_path", "{path}", "--merge_model_path", "out"],
    "merge_tp_params.py": ["--model_name_or_path", "{path}"],
    "export_model.py": ["--model_name_or_path", "{path}", "--output_path", "out", "--device", "cpu"],
    "predict_generation.py": ["--model_name_or_path", "{path}", "--device", "cpu"],
    "finetune.chat": ["--model_name_or_path", "{path}", "--device", "cpu"],
    "finetune.serving.gguf": ["--model_name_or_path", "{path}", "--output_path", "out"],
    "finetune.models.tiny": ["llama", "{path}/model"],
}
WITHOUT_RIGHTS = """
import runpy, sys
from tests.rights import drop_rights
drop_rights()
name, sys.argv = sys.argv[1], sys.argv[1:]
if name.endswith(".py"):
    runpy.run_path(name, run_name="__main__")
else:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def closed_folder(tmp_path):
    """A folder that nobody may enter, and that root may."""
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "config.json").write_text('{"model_type": "llama"}')
    closed.chmod(0)
    yield closed
    closed.chmod(0o755)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("kind", ["closed", "too long"])
def test_every_command_tells_a_path_that_cannot_be_used(name, kind, closed_folder):
    path = str(closed_folder) if kind == "closed" else "a" * 300 + "/" + "b" * 4000
    words = [word.replace("{path}", path) for word in COMMANDS[name]]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_RIGHTS, name, *words],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    reason = "Permission denied" if kind == "closed" else "File name too long"
    if name == "finetune.chat" and importlib.util.find_spec("gradio") is None:
        reason = "Gradio, which is not installed"
    if name == "finetune.serving.gguf" and importlib.util.find_spec("gguf") is None:
        reason = "gguf, which is not installed"
    assert reason in result.stderr


def test_arguments_that_are_no_utf8(tmp_path):
    result = launch(
        "finetune_generation.py", "--model_name_or_path", os.fsdecode(b"a\xff"), "--output_dir", "out"
    )
    assert result.returncode == 2
    assert 'model_name_or_path is "a\\udcff" on the command line: it holds half a character' in result.stderr
    assert "Traceback" not in result.stderr


def test_an_output_that_takes_nothing_more_is_named():
    code = "import sys; from finetune.processes.command import run_command; sys.exit(run_command(lambda: print('x', flush=True)))"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert result.returncode == 1
    assert result.stderr == (
        "error: the output of this command: No space left on device: make room on that disk, or choose another one\n"
    )
