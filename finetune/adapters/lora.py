"""LoRA adapters on PaddleNLP's layers.

A linear layer's weight W [in, out] stays frozen and gets a low-rank update
    W + scaling * A @ B,    A [in, r],  B [r, out],  scaling = alpha / r   (rsLoRA: alpha / sqrt(r))
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021);
Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023).

A model may be one process's part of a larger one: layers of other pipeline stages are stubs (layers with
`is_placeholder`), weights are this tensor rank's slices. The adapter is then the same part of the whole adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddlenlp import peft
from paddlenlp.peft import LoRAConfig

from finetune.adapters.files import load_adapter_weights
from finetune.errors import UserError
from finetune.machine.randomness.seeding import derive_seed
from finetune.models.layers import layer_list
from finetune.models.local_layers import is_stage, layer_numbers
from finetune.models.quantised.layers import hold_packed, is_packed, release_packed
from finetune.storage.files import is_present, read_json_object

CONFIG_FILE = "lora_config.json"


class LoRAModel(peft.LoRAModel):
    """PaddleNLP's, for a model that may be one process's part of a larger one.

    Args:
        model: The model with its weights.
        config: The adapter's settings.
        seed: The seed of the run. Every A is drawn whole by its module's name and then cut, so that it does
            not depend on how the model is divided.
    """

    def __init__(self, model: Any, config: LoRAConfig, *, seed: int = 0):
        config.tensor_parallel_degree = model.config.tensor_parallel_degree  # PaddleNLP warns otherwise
        super().__init__(model, config)
        for name, layer in model.named_sublayers():
            if getattr(layer, "lora_A", None) is None:
                continue
            if getattr(layer, "pissa", False):
                # At once, not in the first forward pass: that would undo what is loaded until then.
                layer.pissa_init(layer.r)
                layer.apply_pissa = True
            else:
                _draw_input_matrix(layer.lora_A, model.config, seed=derive_seed(seed, "lora", name))

    def _find_and_replace_module(self, model: Any, module_name: str, *settings: Any) -> None:
        layer = model.get_sublayer(module_name)
        if getattr(layer, "is_placeholder", False):
            return
        try:
            if is_packed(layer):
                self._replace_packed(model, module_name, *settings)
            else:
                super()._find_and_replace_module(model, module_name, *settings)
        except ValueError as error:
            raise UserError(
                f"lora_target_modules: {module_name} is a {type(layer).__name__}, but only linear layers can get "
                "a low-rank update: name it in modules_to_save to train it whole, or narrow the pattern."
            ) from error

    def _replace_packed(self, model: Any, module_name: str, *settings: Any) -> None:
        """Puts the update over a layer with a packed weight; PaddleNLP's layer is made without memory for one."""
        packed = release_packed(model.get_sublayer(module_name))
        with paddle.LazyGuard():
            super()._find_and_replace_module(model, module_name, *settings)
        adapted = model.get_sublayer(module_name)
        adapted.lora_A.initialize()
        adapted.lora_B.initialize()
        hold_packed(adapted, packed)


def _draw_input_matrix(matrix: Any, config: Any, *, seed: int) -> None:
    """Sets A [in, r] to a uniform draw within +-1 / sqrt(in), or to this tensor rank's rows of one.

    That is PaddleNLP's and peft's distribution, He et al.'s with a negative slope of sqrt(5).
    """
    degree = max(config.tensor_parallel_degree, 1) if matrix.is_distributed else 1
    num_rows, rank = matrix.shape
    bound = 1 / math.sqrt(num_rows * degree)
    whole = np.random.default_rng(seed).uniform(
        -bound, bound, (num_rows * degree, rank)
    )  # [in, r], of all ranks
    first = max(config.tensor_parallel_rank, 0) * num_rows if degree > 1 else 0
    matrix.set_value(_as_tensor(whole[first : first + num_rows], matrix.dtype))


def _as_tensor(array: NDArray[Any], dtype: Any) -> Any:
    return paddle.to_tensor(array.astype(np.float32)).astype(dtype)


def add_lora(model: Any, settings: Any, *, family: Any, dtype: str, seed: int = 0) -> LoRAModel:
    """Wraps a model so that only its LoRA matrices train.

    Args:
        model: A PaddleNLP causal language model.
        settings: The model arguments (`lora_rank`, `lora_alpha`, `lora_dropout`, ...).
        family: The record of the model's family, for the default target modules.
        dtype: Dtype of the adapter's weights.
        seed: The seed of the run, for the initial weights.

    Returns:
        PaddleNLP's LoRAModel.

    Raises:
        UserError: No module of the model matches the target patterns.
    """
    targets = list(settings.lora_target_modules or family.lora_target_modules)
    num_layers = family.prefix_geometry(model.config).num_layers
    if settings.lora_target_modules:
        check_targets(model, targets, num_layers=num_layers)
    saved = settings.modules_to_save
    if saved:
        check_saved_modules(model, saved, targets=targets, num_layers=num_layers)
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
    return LoRAModel(model, config, seed=seed)


def load_lora(model: Any, folder: Path, *, modules_to_save: list[str] | None = None) -> LoRAModel:
    """Puts a saved adapter on a model, trainable again, in the dtype of the model.

    Args:
        model: The model that it was trained on.
        folder: The adapter's folder.
        modules_to_save: Modules that the run wants trained whole; None for those of the adapter.

    Raises:
        UserError: The folder holds no adapter, one of another shape, or one that trains other modules whole.
    """
    if not is_present(folder / CONFIG_FILE):
        raise UserError(
            f"lora_path {folder} holds no {CONFIG_FILE}: point it at the output folder "
            "(or a checkpoint) of a LoRA run."
        )
    fields = read_json_object(folder / CONFIG_FILE)
    fields.pop("scaling", None)
    patterns = [saved_pattern(name) for name in modules_to_save or ()]
    if patterns and set(patterns) != set(fields.get("trainable_modules") or ()):
        raise UserError(
            f"modules_to_save is {', '.join(modules_to_save or ())}, but the adapter in lora_path {folder} was "
            f"trained with {fields.get('trainable_modules') or 'none'}: remove modules_to_save to go on with "
            "the adapter's, or start a new one"
        )
    # Whatever it was trained in: layers cannot multiply tensors of two types.
    fields["dtype"] = model.config.dtype
    config = LoRAConfig(**{key: value for key, value in fields.items() if hasattr(LoRAConfig(), key)})
    adapted = LoRAModel(model, config)
    load_adapter_weights(adapted, folder, is_stage=is_stage(model))
    return adapted


def saved_pattern(name: str) -> str:
    """PaddleNLP's pattern for all parameters of the modules whose names end in `name`."""
    return rf"(.*\.)?{re.escape(name)}\.[^.]+"


def check_saved_modules(model: Any, names: list[str], *, targets: list[str], num_layers: int) -> None:
    """Every name must be that of a module with parameters, and of none that gets a low-rank update too.

    Raises:
        UserError: Names that fit nothing or both, or modules with packed weights.
    """
    found = dict(_weighted_modules(model, num_layers))
    modules = list(found)
    packed = {name.rpartition(".")[2] for name, layer in found.items() if is_packed(layer)}
    if frozen := [name for name in names if name in packed]:
        raise UserError(
            f"modules_to_save: {', '.join(frozen)} is held in packed weights (weight_quantize_algo), which cannot be "
            "trained whole: adapt it with lora_target_modules, or train without weight_quantize_algo."
        )
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


def _weighted_modules(model: Any, num_layers: int) -> Iterator[tuple[str, Any]]:
    """Names and layers of modules with weights of their own, those on other pipeline stages included.

    A stub stands for every such module outside the decoder layers. The layers are alike, so what one holds
    is found under the numbers of the others, too.
    """
    first = layer_numbers(layer_list(model))[0] if is_stage(model) else None
    for name, layer in model.named_sublayers():
        has_weights = is_packed(layer) or layer.parameters(include_sublayers=False)
        if not getattr(layer, "is_placeholder", False) and not has_weights:
            continue
        parts = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        if first is None or parts is None:
            yield name, layer
        elif int(parts[2]) == first:
            yield from ((f"{parts[1]}{number}{parts[3]}", layer) for number in range(num_layers))


def check_targets(model: Any, targets: list[str] | str, *, num_layers: int) -> None:
    """Every pattern must fit at least one linear layer; a typo would silently train less."""
    patterns = [targets] if isinstance(targets, str) else targets
    names = [
        name
        for name, layer in _weighted_modules(model, num_layers)
        if hasattr(layer, "weight") or getattr(layer, "is_placeholder", False)
    ]
    unused = [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in names)]
    if unused:
        leaves = sorted({name.rpartition(".")[2] for name in names})
        raise UserError(
            f"lora_target_modules: no module matches {', '.join(map(repr, unused))}. The patterns are regular "
            f"expressions for whole module names; the last parts of this model's names are: {', '.join(leaves)}."
        )
