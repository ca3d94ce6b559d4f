"""Checkpoints are whole or absent, and altered ones are noticed."""

import errno
import json
import os
from pathlib import Path

import pytest

from finetune.checkpoints import folder as module
from finetune.checkpoints.folder import (
    find_fault,
    list_checkpoints,
    list_foreign,
    newest_valid_checkpoint,
    remove_leftovers,
    rotate,
    set_aside,
    write_checkpoint,
)


def write(output_dir: Path, step: int, content: bytes = b"weights") -> Path:
    def files(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)
        (folder / "config.json").write_text("{}")

    return write_checkpoint(output_dir, step, files)


def test_written_checkpoint_is_valid_and_lists_every_file(tmp_path):
    folder = write(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert folder.name == "checkpoint-7"
    assert set(manifest["files"]) == {"model.safetensors", "config.json"}
    assert manifest["step"] == 7
    assert find_fault(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-7"]


def damage_truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weig")


def damage_flip(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weiGhts")


def damage_delete(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": ')


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "model.safetensors has 4 bytes instead of 7"),
        (damage_flip, "model.safetensors was altered after it was written"),
        (damage_delete, "config.json is missing"),
        (damage_manifest, "its manifest.json cannot be read"),
        (damage_no_manifest, "it has no manifest.json"),
    ],
)
def test_damage_is_noticed_and_the_checkpoint_before_is_used(tmp_path, damage, message):
    older = write(tmp_path, 5)
    newer = write(tmp_path, 10)
    damage(newer)
    warnings: list[str] = []
    assert message in (find_fault(newer) or "")
    assert newest_valid_checkpoint(tmp_path, warnings.append) == older
    assert len(warnings) == 1
    assert "checkpoint-10 is not used" in warnings[0]
    assert message in warnings[0]


def test_failure_inside_a_save_leaves_the_older_checkpoint_alone(tmp_path):
    older = write(tmp_path, 5)

    def files(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, 10, files)
    assert list_checkpoints(tmp_path) == [older]
    assert find_fault(older) is None
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_same_step_is_replaced_only_by_a_complete_one(tmp_path):
    write(tmp_path, 5, b"old")
    write(tmp_path, 5, b"new")
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    for step in (100, 20, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (2, 1, [1, 4]),
        (1, 2, [2, 4]),
        (1, 4, [4]),
        (3, 1, [1, 3, 4]),
        (9, None, [1, 2, 3, 4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    folders = {step: write(tmp_path, step) for step in (1, 2, 3, 4)}
    rotate(tmp_path, keep=keep, best=folders.get(best), newest=folders[4])
    assert [module.step_of(p) for p in list_checkpoints(tmp_path)] == left


def test_set_aside_checkpoints_go_only_when_a_new_one_stands(tmp_path):
    write(tmp_path, 5)
    set_aside(tmp_path)
    assert list_checkpoints(tmp_path) == []
    assert (tmp_path / "replaced-checkpoint-5").is_dir()
    rotate(tmp_path, keep=None, best=None, newest=write(tmp_path, 2))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_only_later_checkpoints_are_set_aside_when_another_history_begins(tmp_path):
    for step in (3, 6, 9):
        write(tmp_path, step)
    set_aside(tmp_path, beyond=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_the_checkpoint_just_written_stays_whatever_else_is_there(tmp_path):
    write(tmp_path, 12)
    newest = write(tmp_path, 4)
    rotate(tmp_path, keep=1, best=None, newest=newest)
    assert newest in list_checkpoints(tmp_path)


def write_foreign(output_dir: Path, step: int) -> Path:
    """A checkpoint as other trainers leave it."""
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model_state.pdparams").write_bytes(b"days of work")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_checkpoints_of_other_programs_are_never_touched(tmp_path):
    foreign = [write_foreign(tmp_path, step) for step in (1, 5, 30)]
    write(tmp_path, 10)
    newest = write(tmp_path, 20)
    warnings: list[str] = []
    assert newest_valid_checkpoint(tmp_path, warnings.append) == newest
    assert warnings == [f"{foreign[2]} is not used: it has no manifest.json."]
    assert list_foreign(tmp_path) == foreign
    rotate(tmp_path, keep=1, best=None, newest=newest)
    set_aside(tmp_path)
    remove_leftovers(tmp_path)
    assert all((folder / "model_state.pdparams").read_bytes() == b"days of work" for folder in foreign)


def test_a_foreign_folder_in_a_checkpoints_place_is_kept_under_another_name(tmp_path):
    for content in (b"first", b"second"):
        folder = write_foreign(tmp_path, 5)
        (folder / "model_state.pdparams").write_bytes(content)
        written = write(tmp_path, 5)
        assert find_fault(written) is None
        (written / "manifest.json").unlink()
        (written / "manifest.json.gone").touch()
        written.rename(tmp_path / f"ours-{content.decode()}")
    kept = [tmp_path / f"kept-checkpoint-5-{number}" / "model_state.pdparams" for number in (1, 2)]
    assert [path.read_bytes() for path in kept] == [b"first", b"second"]


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", '"text"', "7", "{}", '{"files": {}}', '{"files": []}', "[" * 100_000,
        '{"step": 10, "files": {"model.safetensors": null}}',
        '{"step": 10, "files": {"model.safetensors": {"size": 7}}}',
        '{"step": 10, "files": {"model.safetensors": {"size": "7", "sha256": "%s"}}}' % ("0" * 64),
        '{"step": 10, "files": {"../x": {"size": 7, "sha256": "%s"}}}' % ("0" * 64),
        '{"step": 10, "files": {"/etc/hostname": {"size": 7, "sha256": "%s"}}}' % ("0" * 64),
        '{"step": 10, "files": {"": {"size": 7, "sha256": "%s"}}}' % ("0" * 64),
    ],
)  # fmt: skip
def test_a_damaged_manifest_never_stops_a_run(tmp_path, text):
    older, newer = write(tmp_path, 5), write(tmp_path, 10)
    (newer / "manifest.json").write_text(text)
    assert "its manifest.json cannot be read" in (find_fault(newer) or "")
    assert newest_valid_checkpoint(tmp_path, lambda _line: None) == older
    rotate(tmp_path, keep=1, best=None, newest=write(tmp_path, 11))
    assert (newer / "model.safetensors").read_bytes() == b"weights", "it may be another program's"


def test_links_to_checkpoints_are_removed_and_what_they_lead_to_stays(tmp_path):
    kept = write(tmp_path / "other disk", 5)
    out = tmp_path / "out"
    newest = write(out, 10)
    (out / "checkpoint-5").symlink_to(kept)
    rotate(out, keep=1, best=None, newest=newest)
    assert [path.name for path in out.iterdir()] == ["checkpoint-10"]
    assert find_fault(kept) is None


def test_a_checkpoint_that_may_not_be_deleted_does_not_stop_a_run(tmp_path, monkeypatch):
    newest = {step: write(tmp_path, step) for step in (1, 2, 3)}[3]
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name == "checkpoint-1":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", refuse)
    failed = rotate(tmp_path, keep=1, best=None, newest=newest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    assert [(path.name, error.errno) for path, error in failed.items()] == [("checkpoint-1", errno.EACCES)]


def test_a_checkpoint_whose_files_may_not_be_deleted_is_told_by_the_name_it_has_now(tmp_path, monkeypatch):
    newest = {step: write(tmp_path, step) for step in (1, 2)}[2]

    def refuse(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder / "model.safetensors"))

    monkeypatch.setattr(module.shutil, "rmtree", refuse)
    for _ in range(2):  # tried again after every save
        assert list(rotate(tmp_path, keep=1, best=None, newest=newest)) == [
            tmp_path / "replaced-checkpoint-1"
        ]


def test_folders_called_like_temporary_files_are_no_leftovers(tmp_path):
    (tmp_path / ".cache.tmp").mkdir()
    (tmp_path / ".arguments.json.tmp").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".cache.tmp"]


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    renamed = write(tmp_path, 5).rename(tmp_path / "checkpoint-6")
    assert "it belongs to step 5" in (find_fault(renamed) or "")


def test_a_deletion_that_was_killed_leaves_nothing_that_is_taken_for_a_checkpoint(tmp_path, monkeypatch):
    folders = {step: write(tmp_path, step) for step in (1, 2)}

    def killed(path: Path, **_options: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, keep=1, best=None, newest=folders[2])
    monkeypatch.undo()
    assert list_foreign(tmp_path) == [] and list_checkpoints(tmp_path) == [folders[2]]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
