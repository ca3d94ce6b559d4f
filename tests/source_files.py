"""The project's own source, for tests that parse it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT


def tracked() -> list[Path]:
    """All files that git knows, and those that it would add."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if found.returncode:
        pytest.skip("not a git checkout")
    return [path for line in found.stdout.splitlines() if (path := ROOT / line).is_file()]


def library() -> list[Path]:
    """The library and the entry scripts."""
    return [*sorted((ROOT / "finetune").rglob("*.py")), *sorted(ROOT.glob("*.py"))]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def shown(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def imported_modules(node: ast.AST) -> Iterator[str]:
    """Dotted names that an import statement may load; "from a import b" gives both "a" and "a.b"."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are absolute here"
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
