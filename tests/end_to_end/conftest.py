from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import FAST, write_arguments


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
