"""Tiny bases and adapters for the tests of the LoRA merge, written by this project's own training code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from finetune.families.family import get_family
from finetune.merge.lora import MergeOptions, merge
from finetune.models.hf_names import is_tied, is_turned, to_hugging_face
from tests.merge.rank_writing import tiny_model

VOCABULARY = 96
TOLERANCE = 2e-5  # of an update added to the weights, and beside them: sums in another order
SCALE = 0.2
"""Spread of the weights: logits of order one."""


def write_base(
    folder: Path, name: str, *, dtype: str = "float32", hugging_face: bool = False, **config: Any
) -> Path:
    """A random model of a family in PaddleNLP's or Hugging Face's form; bfloat16 is float32 cut short."""
    settings, weights = tiny_model(name, num_layers=2)
    family = get_family(name)
    settings |= config
    tied = is_tied(settings, family)
    tensors = {}
    for key, value in weights.items():
        if key == "lm_head.weight" and tied:
            continue
        value = (
            value * np.float32(SCALE)
            if value.ndim > 1
            else value * np.float32(0.1) + np.float32("norm" in key)
        )
        if hugging_face:
            value = value.T if is_turned(key, value.shape, family, tied=tied) else value
            key = to_hugging_face(key, family)
        value = np.ascontiguousarray(value)
        tensors[key] = (
            (value.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else value.astype(dtype)
        )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt" if hugging_face else "np"})
    return folder


def add_random_lora(
    base: Path, *, num_tokens: int | None = None, overrides: Any = None, **settings: Any
) -> Any:
    """The base in float32 with an adapter whose A and B are random."""
    import paddle

    from finetune.adapters.lora import add_lora
    from finetune.models.loading import load_model
    from finetune.models.resolve import resolve_model
    from finetune.models.vocabulary import find_growth

    resolved = resolve_model(base)
    growth = find_growth(VOCABULARY, num_tokens or 0, family=resolved.family, other_tokenizer=True)
    model = load_model(resolved, dtype="float32", growth=growth, config_overrides=overrides)
    given = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "rslora": False, "lora_plus_scale": 1.0,
             "pissa": False, "lora_target_modules": None, "modules_to_save": None,
             "use_dora": False, "lora_use_mixer": False, "rank_pattern": None, "alpha_pattern": None, "lora_bias": "none", "lora_dtype": None,
             "init_lora_weights": "default", "vera": False, "vera_rank": 16, "projection_prng_key": 3, "d_initial": 0.1,
             "save_projection": True, "lokr": False, "lokr_dim": 3, "lokr_alpha": None, "lokr_factor": -1, "decompose_both": False,
             "model_name_or_path": str(base)} | settings  # fmt: skip
    adapted = add_lora(model, SimpleNamespace(**given), family=resolved.family, dtype="float32", seed=3)
    generator = np.random.default_rng(9)
    for tensor in adapted.parameters():
        if not tensor.stop_gradient:
            change = 0.1 * generator.standard_normal(tensor.shape).astype(np.float32)
            tensor.set_value(tensor + paddle.to_tensor(change))
    return adapted


def write_adapter(folder: Path, base: Path, *, num_tokens: int | None = None, **settings: Any) -> np.ndarray:
    """Saves such an adapter; returns the logits of base and adapter."""
    from finetune.adapters.files import save_adapter

    adapted = add_random_lora(base, num_tokens=num_tokens, **settings)
    folder.mkdir(parents=True)
    save_adapter(adapted, folder, num_tokens=num_tokens)
    return logits(adapted)


def logits(model: Any) -> np.ndarray:
    """Of twelve tokens, [1, 12, vocabulary]."""
    import paddle

    from finetune.training.loss import logits_of

    model.eval()
    with paddle.no_grad():
        return logits_of(model(input_ids=paddle.arange(3, 15).reshape([1, 12]))).numpy()


def folder_logits(folder: Path) -> np.ndarray:
    """Logits of a model folder in float32."""
    from finetune.models.loading import load_model
    from finetune.models.resolve import resolve_model

    return logits(load_model(resolve_model(folder), dtype="float32"))


def run_merge(base: Path | None, *adapters: Path, output: Path, **options) -> Path:
    merge(MergeOptions(base, adapters, output, **options))
    return output


def check_logits(found: np.ndarray, expected: np.ndarray, plain: np.ndarray | None = None) -> None:
    """Equal to 1e-5 of the logits' spread, or absolute where that is below one; and not those of the base."""
    limit = TOLERANCE * max(1.0, float(expected.std()))
    assert np.abs(found - expected).max() < limit
    if plain is not None:
        assert np.abs(plain - expected).max() > 100 * limit


def edit_adapter(folder: Path, **changes) -> None:
    path = folder / "lora_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
