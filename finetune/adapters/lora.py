"""LoRA adapters on PaddleNLP's layers.

A linear layer's weight W [in, out] stays frozen and gets a low-rank update
    W + scaling * A @ B,    A [in, r],  B [r, out],  scaling = alpha / r   (rsLoRA: alpha / sqrt(r))
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021);
Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from finetune.errors import UserError

CONFIG_FILE = "lora_config.json"


def add_lora(model: Any, settings: Any, *, family: Any, dtype: str) -> Any:
    """Wraps a model so that only its LoRA matrices train.

    Args:
        model: A PaddleNLP causal language model.
        settings: The model arguments (`lora_rank`, `lora_alpha`, `lora_dropout`, ...).
        family: The record of the model's family, for the default target modules.
        dtype: Dtype of the adapter's weights.

    Returns:
        PaddleNLP's LoRAModel.

    Raises:
        UserError: No module of the model matches the target patterns.
    """
    from paddlenlp.peft import LoRAConfig, LoRAModel

    targets = list(settings.lora_target_modules or family.lora_target_modules)
    if settings.lora_target_modules:
        check_targets(model, targets)
    saved = settings.modules_to_save
    if saved:
        check_saved_modules(model, saved, targets=targets)
    config = LoRAConfig(
        target_modules=targets,
        trainable_modules=[saved_pattern(name) for name in saved] if saved else None,
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        rslora=settings.rslora,
        lora_plus_scale=settings.lora_plus_scale,
        pissa=settings.pissa,
        merge_weights=False,
        dtype=dtype,
        base_model_name_or_path=str(settings.model_name_or_path),
    )
    return LoRAModel(model, config)


def load_lora(model: Any, folder: Path, *, modules_to_save: list[str] | None = None) -> Any:
    """Puts a saved adapter on a model, trainable again.

    Args:
        model: The model that it was trained on.
        folder: The adapter's folder.
        modules_to_save: Modules that the run wants trained whole; None for those of the adapter.

    Raises:
        UserError: The folder holds no adapter, one of another shape, or one that trains other modules whole.
    """
    from paddlenlp.peft import LoRAConfig, LoRAModel

    from finetune.adapters.checkpoint import load_adapter_weights

    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"lora_path {folder} holds no {CONFIG_FILE}: point it at the output folder "
            "(or a checkpoint) of a LoRA run."
        )
    fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    fields.pop("scaling", None)
    patterns = [saved_pattern(name) for name in modules_to_save or ()]
    if patterns and set(patterns) != set(fields.get("trainable_modules") or ()):
        raise UserError(
            f"modules_to_save is {', '.join(modules_to_save or ())}, but the adapter in lora_path {folder} was "
            f"trained with {fields.get('trainable_modules') or 'none'}: remove modules_to_save to go on with "
            "the adapter's, or start a new one"
        )
    config = LoRAConfig(**{key: value for key, value in fields.items() if hasattr(LoRAConfig(), key)})
    adapted = LoRAModel(model, config)
    load_adapter_weights(adapted, folder)
    return adapted


def saved_pattern(name: str) -> str:
    """PaddleNLP's pattern for all parameters of the modules whose names end in `name`."""
    return rf"(.*\.)?{re.escape(name)}\.[^.]+"


def check_saved_modules(model: Any, names: list[str], *, targets: list[str]) -> None:
    """Every name must be that of a module with parameters, and of none that gets a low-rank update too.

    Raises:
        UserError: Names that fit nothing or both.
    """
    modules = [name for name, layer in model.named_sublayers() if layer.parameters(include_sublayers=False)]
    leaves = {name.rpartition(".")[2] for name in modules}
    if unknown := [name for name in names if name not in leaves]:
        raise UserError(
            f"modules_to_save: this model has no module called {', '.join(map(repr, unknown))} with weights of "
            f"its own; there are: {', '.join(sorted(leaves))}."
        )
    adapted = {
        name.rpartition(".")[2] for name in modules if any(re.fullmatch(each, name) for each in targets)
    }
    if both := [name for name in names if name in adapted]:
        raise UserError(
            f"modules_to_save: {', '.join(both)} gets a low-rank update as well (lora_target_modules): choose one."
        )


def check_targets(model: Any, targets: list[str] | str) -> None:
    """Every pattern must fit at least one linear layer; a typo would silently train less."""
    patterns = [targets] if isinstance(targets, str) else targets
    names = [name for name, layer in model.named_sublayers() if hasattr(layer, "weight")]
    unused = [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in names)]
    if unused:
        leaves = sorted({name.rpartition(".")[2] for name in names})
        raise UserError(
            f"lora_target_modules: no module matches {', '.join(map(repr, unused))}. The patterns are regular "
            f"expressions for whole module names; the last parts of this model's names are: {', '.join(leaves)}."
        )
