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
    config = LoRAConfig(
        target_modules=targets,
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


def load_lora(model: Any, folder: Path) -> Any:
    """Puts a saved adapter on a model, trainable again.

    Raises:
        UserError: The folder holds no adapter or one of another shape.
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
    config = LoRAConfig(**{key: value for key, value in fields.items() if hasattr(LoRAConfig(), key)})
    adapted = LoRAModel(model, config)
    load_adapter_weights(adapted, folder)
    return adapted


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
