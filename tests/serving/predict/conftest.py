"""Models that several tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.serving.decoding.options import ModelOptions
from finetune.serving.predict.loading import load_responder, plan_model
from tests.serving.predict.builders import save_lora


@pytest.fixture(scope="session")
def lora_folder(sharp_llama, tmp_path_factory) -> Path:
    return save_lora(sharp_llama, tmp_path_factory.mktemp("adapter") / "lora")


@pytest.fixture(scope="session")
def responder(sharp_llama):
    return load_responder(plan_model(ModelOptions(model_name_or_path=str(sharp_llama))))
