"""The container's recipe names files that are there, and its context holds what the build reads and nothing else.

No image is built here: that needs a registry. The steps after the base image are those of the wheel's test.
"""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.source_files import tracked
from tools.wheel_files import SHIPPED

RECIPE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def is_in_context(path: Path) -> bool:
    """Whether .dockerignore lets a file in: of the patterns that match it or a folder above it, the last one counts."""
    let_in = True
    names = [str(path), *map(str, path.parents)][:-1]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        depth = pattern.count("/") + 1
        found = any(name.count("/") + 1 == depth and fnmatch.fnmatch(name, pattern) for name in names)
        if found or (pattern.startswith("**/") and any(Path(name).name == pattern[3:] for name in names)):
            let_in = line.startswith("!")
    return let_in


def test_the_context_holds_what_the_build_reads():
    files = [path.relative_to(ROOT) for path in tracked()]
    inside = {str(path) for path in files if is_in_context(path)}
    needed = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "tools/wheel_files.py"}
    needed |= {str(path.relative_to(ROOT)) for pattern in SHIPPED for path in ROOT.glob(pattern)}
    needed |= {str(path) for path in files if path.parts[0] == "finetune" or path.suffix == ".lock"}
    assert needed <= inside
    assert {Path(name).parts[0] for name in inside}.isdisjoint({"tests", "docs", "benchmarks", ".ci", ".git"})
    assert not is_in_context(Path("finetune/__pycache__/x.pyc"))
    assert not is_in_context(Path("checkpoints/run/model.safetensors"))


def test_locks_and_program_are_there():
    locks = set(re.findall(r"requirements/\w+\.lock", RECIPE))
    assert locks == {"requirements/cpu.lock", "requirements/base.lock"}
    assert all((ROOT / lock).is_file() for lock in locks)
    (program,) = json.loads(re.search(r"^ENTRYPOINT (.*)$", RECIPE, re.MULTILINE)[1])
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf"^\[project\.scripts\]\n{program} = ", project, re.MULTILINE)


@pytest.mark.parametrize("lock", ["cpu", "base"])
def test_the_build_without_isolation_finds_its_backend_in_the_lock(lock):
    assert re.search(r"^setuptools==", (ROOT / f"requirements/{lock}.lock").read_text(), re.MULTILINE)
