"""Checkpoints are whole or absent, and altered ones are noticed."""

import json
from pathlib import Path

import pytest

from finetune.training import checkpoint as module
from finetune.training.checkpoint import (
    find_fault,
    list_checkpoints,
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
