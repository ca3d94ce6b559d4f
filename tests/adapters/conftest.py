"""Tiny models to put adapters on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from finetune.models.layers import decoder_layers
from finetune.models.loading import load_model
from finetune.models.local_layers import replace_layers
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny

SETTINGS = {
    "lora_target_modules": None, "lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.0, "rslora": False,
    "lora_plus_scale": 1.0, "pissa": False, "model_name_or_path": "tiny", "modules_to_save": None,
    "use_dora": False, "lora_use_mixer": False, "rank_pattern": None, "alpha_pattern": None, "lora_bias": "none", "lora_dtype": None,
    "init_lora_weights": "default", "vera": False, "lokr": False,
    "num_prefix_tokens": 3,
}  # fmt: skip


@pytest.fixture
def settings() -> SimpleNamespace:
    """Model arguments that adapters read."""
    return SimpleNamespace(**SETTINGS)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Family -> folder of a tiny checkpoint of four layers, made when first asked for."""
    made: dict = {}

    def folder_of(family: str, **options):
        key = (family, *options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("adapters") / family
            shape = {"vocab_size": 500, "num_layers": 4, "num_heads": 4, "hidden_size": 32} | options
            made[key] = build_tiny(family, folder, **shape)
        return made[key]

    return folder_of


@pytest.fixture
def load(tiny_folders):
    """Loads a tiny model of a family; its record comes with it."""

    def load_family(family: str = "llama", **options):
        resolved = resolve_model(tiny_folders(family, **options))
        model = load_model(resolved, dtype="float32", config_overrides={"use_cache": False})
        return model, resolved.family

    return load_family


def make_stage(model, first: int, stop: int, *, outside=()) -> None:
    """Leaves a model the layers [first, stop) under their numbers, and stubs for modules outside of them."""
    from paddle import nn

    class PlaceholderModule(nn.Layer):
        is_placeholder = True

    layers = decoder_layers(model)
    replace_layers(model, {number: layers[number] for number in range(first, stop)})
    for name in outside:
        *parents, last = name.split(".")
        owner = model
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, PlaceholderModule())
