"""How ranks come to one key, and which files are not trusted with it."""

from __future__ import annotations

import os
import stat

import pytest

from finetune.errors import UserError
from finetune.processes.network import secret as module
from finetune.processes.network.secret import VARIABLE, JobSecret, shared_key, withdraw_secret

ONE_HOST = ["10.0.0.1:5000", "10.0.0.1:5001"]
TWO_HOSTS = ["10.0.0.1:5000", "10.0.0.2:5000"]


@pytest.fixture(autouse=True)
def own_place(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_keys", {})
    monkeypatch.setattr(module, "_issued", {})


def test_the_ranks_of_one_machine_find_it_in_a_private_folder(tmp_path):
    first, second = JobSecret(ONE_HOST), JobSecret(ONE_HOST)
    assert second.look_up() is None
    key = first.issue()
    assert second.look_up() == key and len(key) == 32
    folder = tmp_path / f"finetune-{os.geteuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key.hex() not in file.read_text(), "what is kept is the secret; what is used is made of it"
    first.withdraw()
    assert second.look_up() is None and not list(folder.iterdir())


def test_every_launch_has_its_own():
    assert JobSecret(ONE_HOST).issue() != JobSecret(ONE_HOST).issue()


def test_several_hosts_share_a_folder_or_the_environment(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="2 hosts and FINETUNE_JOB_SECRET is not set"):
        JobSecret(TWO_HOSTS)
    out = tmp_path / "runs" / "out"
    first = JobSecret(TWO_HOSTS, out)
    key = first.issue()
    assert JobSecret(TWO_HOSTS, out).look_up() == key
    first.withdraw()
    assert not out.exists(), "the folder was made for it"
    monkeypatch.setenv(VARIABLE, "long enough for a secret")
    key = JobSecret(TWO_HOSTS).issue()
    assert JobSecret(TWO_HOSTS).look_up() == key
    assert JobSecret(ONE_HOST).look_up() != key, "another job"
    monkeypatch.setenv(VARIABLE, "too short")
    with pytest.raises(UserError, match="has 9 characters but must have at least 16"):
        JobSecret(TWO_HOSTS)


def test_a_folder_with_something_in_it_stays(tmp_path):
    out = tmp_path / "out"
    first = JobSecret(TWO_HOSTS, out)
    first.issue()
    (out / "checkpoint-1").mkdir()
    first.withdraw()
    assert [path.name for path in out.iterdir()] == ["checkpoint-1"]


def test_a_file_that_others_can_read_or_have_laid_is_refused(tmp_path):
    issued = JobSecret(ONE_HOST)
    issued.issue()
    reader = JobSecret(ONE_HOST)
    path = next((tmp_path / f"finetune-{os.geteuid()}").iterdir())
    text = path.read_text()
    path.chmod(0o640)
    with pytest.raises(UserError, match=r"others may read it \(mode 640\)"):
        reader.look_up()
    path.chmod(0o600)
    path.write_text(text + "x")
    with pytest.raises(UserError, match="does not hold 64 characters"):
        reader.look_up()
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="cannot be trusted"):
        reader.look_up()
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(UserError, match="it is no file"):
        reader.look_up()


def test_a_private_folder_that_is_not_private_is_refused(tmp_path):
    folder = tmp_path / f"finetune-{os.geteuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(UserError, match="mode 700"):
        JobSecret(ONE_HOST)
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="mode 700"):
        JobSecret(ONE_HOST)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no secret for the other processes can be left in"):
        JobSecret(TWO_HOSTS, tmp_path / "file" / "out").issue()


def test_what_a_killed_run_left_is_removed_later(tmp_path):
    JobSecret(ONE_HOST).issue()
    folder = tmp_path / f"finetune-{os.geteuid()}"
    (old,) = folder.iterdir()
    os.utime(old, (0, 0))
    JobSecret(["10.0.0.1:7", "10.0.0.1:8"]).issue()
    assert old not in folder.iterdir() and len(list(folder.iterdir())) == 1


def test_links_without_a_watch_agree_by_themselves(tmp_path):
    key = shared_key(0, ONE_HOST, timeout_seconds=1)
    assert shared_key(0, ONE_HOST, timeout_seconds=1) == key, "agreed on once"
    module._keys.clear()
    assert shared_key(1, ONE_HOST, timeout_seconds=1) == key
    withdraw_secret(ONE_HOST)
    module._keys.clear()
    with pytest.raises(UserError, match="rank 0 left no secret at"):
        shared_key(1, ONE_HOST, timeout_seconds=0.2)
