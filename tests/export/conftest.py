"""Exports that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.builders import build_sharp, export_folder


@pytest.fixture(scope="session")
def sharp_llama(tmp_path_factory) -> Path:
    return build_sharp("llama", tmp_path_factory.mktemp("sharp") / "llama")


@pytest.fixture(scope="session")
def exported_llama(sharp_llama, tmp_path_factory) -> Path:
    return export_folder(sharp_llama, tmp_path_factory.mktemp("exported") / "llama")
