from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.models.tiny.checkpoint import build_tiny
from tests.conftest import FAST, write_arguments
from tests.end_to_end.family_models import OPTIONS, TINY


@pytest.fixture(scope="session")
def write_run(tiny_llama, small_data, tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """Writes the argument file of a short run into a fresh folder; returns it and the run's output folder."""

    def write(name: str, **settings) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        base = FAST | {
            "model_name_or_path": str(tiny_llama),
            "dataset_name_or_path": str(small_data),
            "output_dir": str(folder / "out"),
        }
        return write_arguments(folder / "arguments.json", **base | settings), folder / "out"

    return write


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Callable[[str], Path]:
    """Gives the tiny checkpoint of a family, built once."""
    found: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("tiny_families")

    def build(family: str) -> Path:
        if family not in found:
            found[family] = build_tiny(family, root / family, **TINY | OPTIONS.get(family, {}))
        return found[family]

    return build
