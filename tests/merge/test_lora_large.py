"""Merging a larger base: memory, a full disk, a killed process."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import merge_lora
from finetune.families.family import families
from tests.conftest import ROOT
from tests.merge.interrupted import kill_while_writing

SCRIPT = ROOT / "merge_lora_params.py"
FAMILIES = sorted(families())
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[Path, Path]:
    """A base of 300 MB in bfloat16, and an adapter on all its linear layers."""
    folder = tmp_path_factory.mktemp("large")
    base, adapter = folder / "base", folder / "adapter"
    merge_lora.write_base(base, 300_000_000, "bfloat16", hugging_face=False)
    merge_lora.write_adapter(adapter, base, rank=8)
    return base, adapter


def _words(large: tuple[Path, Path], output: Path) -> list[str]:
    base, adapter = map(str, large)
    return ["--model_name_or_path", base, "--lora_path", adapter, "--merge_model_path", str(output)]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_memory_does_not_grow_with_the_model(large, tmp_path):
    program = (
        "import os, sys; os.environ['OPENBLAS_NUM_THREADS'] = '1'; "
        "from finetune.merge.lora import main; main(sys.argv[1:]); "
        "print(*[line for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    words = [sys.executable, "-c", program, *_words(large, tmp_path / "out")]
    run = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-2]) < 150_000, "kB; the model has 300 MB, its largest tensor 131"


def test_full_disk(large, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))

    words = [sys.executable, str(SCRIPT), *_words(large, tmp_path / "out")]
    run = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT, preexec_fn=limit)
    assert run.returncode == 2, run.stderr
    assert "has no room for the result" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_killed_merge_leaves_nothing_that_looks_finished(large, tmp_path):
    words = [sys.executable, str(SCRIPT), *_words(large, tmp_path / "out")]
    hidden = kill_while_writing(words, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {hidden.name, ".out.lock"}
    run = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
