"""A place on the disk is written by one process at a time, and the second one hears who that is."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.storage.files import fill_folder
from finetune.storage.lock import hold_output, remove_dead_lock, take_lock
from finetune.storage.output_folder import check_output, output_folder

_ROOT = Path(__file__).resolve().parents[2]
_HOLDER = """
import sys, time
from pathlib import Path
from finetune.storage.lock import hold_output
with hold_output(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes tmp_path/out as long as its stdin is open."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_one_hears_who_writes_there(holder, tmp_path):
    text = rf"output_dir \S+out is in use by another running process \(process {holder.pid} on \S+, since 20[\d-]+ [\d:]+\)"
    with pytest.raises(UserError, match=text), hold_output(tmp_path / "out", f"output_dir {tmp_path}/out"):
        raise AssertionError("both hold it")


def test_a_dead_process_blocks_nobody(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / ".out.lock").exists()
    with hold_output(tmp_path / "out", "output_dir out"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_process_that_ends_leaves_no_lock(holder, tmp_path):
    holder.communicate("")
    assert os.listdir(tmp_path) == []


def test_two_merges_into_one_folder(holder, tmp_path):
    with pytest.raises(UserError, match=rf"--output_dir .*in use.*process {holder.pid} "):
        check_output(tmp_path / "out", [tmp_path / "in"], overwrite=False)
    with pytest.raises(UserError, match="in use"), output_folder(tmp_path / "out", {}):
        raise AssertionError("both write it")
    assert not (tmp_path / ".out.incomplete").exists()


def test_a_merge_leaves_its_folder_only(tmp_path):
    check_output(tmp_path / "deep" / "out", [tmp_path / "in"], overwrite=False)
    with output_folder(tmp_path / "deep" / "out", {"source": "here"}) as folder:
        (folder / "weights").touch()
        with pytest.raises(UserError, match=f"process {os.getpid()} "):
            take_lock(tmp_path / "deep" / ".out.lock", "--output_dir out")
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_what_a_damaged_lock_holds_is_not_repeated(tmp_path):
    with hold_output(tmp_path / "out", "output_dir out"):
        for content in ("", "null", '{"pid": "x"}', "[" * 10_000):
            (tmp_path / ".out.lock").write_text(content)
            with pytest.raises(UserError, match=re.escape("running process: wait")):
                take_lock(tmp_path / ".out.lock", "output_dir out")


def test_a_folder_beside_the_lock_is_filled_as_before(tmp_path):
    with hold_output(tmp_path / "out", "output_dir out"), fill_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert os.listdir(tmp_path) == ["out"]


def test_a_dead_lock_beside_a_finished_output_is_removed(holder, tmp_path):
    remove_dead_lock(tmp_path / "out")
    assert (tmp_path / ".out.lock").exists()  # it is alive
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    remove_dead_lock(tmp_path / "out")
    assert os.listdir(tmp_path) == []
