"""Models that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.predict.loading import load_responder, plan_model
from finetune.predict.options import ModelOptions
from tests.export.builders import build_sharp, export_folder
from tests.predict.builders import save_lora


@pytest.fixture(scope="session")
def sharp_llama(tmp_path_factory) -> Path:
    return build_sharp("llama", tmp_path_factory.mktemp("sharp") / "llama")


@pytest.fixture(scope="session")
def exported_llama(sharp_llama, tmp_path_factory) -> Path:
    return export_folder(sharp_llama, tmp_path_factory.mktemp("exported") / "llama")


@pytest.fixture(scope="session")
def lora_folder(sharp_llama, tmp_path_factory) -> Path:
    return save_lora(sharp_llama, tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture(scope="session")
def responder(sharp_llama):
    return load_responder(plan_model(ModelOptions(model_name_or_path=str(sharp_llama))))
