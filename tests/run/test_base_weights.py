"""An adapter that continues on other base weights than it began with is told so."""

import pytest

from finetune.run.base_weights import BASE_FILE, compare_base, describe_weights
from finetune.run.directory import RunDirectory


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4000)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path):
    (tmp_path / "out").mkdir()
    return RunDirectory(tmp_path / "out")


def test_the_same_weights_are_passed_over_in_silence(base, run):
    assert compare_base(run, base) == []
    run.resume = run.path / "checkpoint-1"
    assert compare_base(run, base) == []


@pytest.mark.parametrize("place", [10, 64 * 4000, 256 * 4000 - 1])
def test_other_weights_of_the_same_size_are_named(base, run, place):
    compare_base(run, base)
    content = bytearray((base / "model.safetensors").read_bytes())
    content[place : place + 1] = b"\xff" if content[place] != 255 else b"\0"
    (base / "model.safetensors").write_bytes(content)
    run.resume = run.path / "checkpoint-1"
    (note,) = compare_base(run, base)
    assert "trained on other base weights" in note and "(model.safetensors)" in note
    assert compare_base(run, base) == [note]  # it stays true


def test_what_a_checkpoint_elsewhere_began_with_counts(base, run, tmp_path):
    first = RunDirectory(tmp_path / "first")
    first.path.mkdir()
    compare_base(first, base)
    (base / "model.safetensors").write_bytes(b"other")
    (base / "more.bin").touch()
    run.resume = first.path / "checkpoint-1"
    (note,) = compare_base(run, base)
    assert "(model.safetensors, more.bin)" in note


def test_a_run_that_begins_notes_what_it_has(base, run):
    (run.path / BASE_FILE).write_text("nonsense")
    assert compare_base(run, base) == []
    run.trained = True
    assert compare_base(run, base) == []
    assert list(describe_weights(base)) == ["model.safetensors"]


def test_runs_from_before_these_notes_are_not_warned(base, run):
    run.resume = run.path / "checkpoint-1"
    assert compare_base(run, base) == []
