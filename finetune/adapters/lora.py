"""LoRA adapters on PaddleNLP's layers.

A linear layer's weight W [in, out] stays frozen and gets a low-rank update
    W + scaling * A @ B,    A [in, r],  B [r, out],  scaling = alpha / r   (rsLoRA: alpha / sqrt(r))
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021);
Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023).

A model may be one process's part of a larger one: layers of other pipeline stages are stubs (layers with
`is_placeholder`), weights are this tensor rank's slices. The adapter is then the same part of the whole adapter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import numpy as np

from finetune.adapters.adapted_modules import (
    adaptable,
    adapted_sizes,
    check_embedding,
    check_not_packed,
    check_saved_modules,
    modules_of,
    trained_whole,
    whole_patterns,
)
from finetune.adapters.adapter_folder import LORA_CONFIG, check_paddle_lora
from finetune.adapters.files import AdapterWeights, load_adapter_weights, open_starts
from finetune.adapters.lora_config import BIAS_ENDING, LayeredLoRAConfig, kind_fields
from finetune.adapters.lora_model import LoRAModel
from finetune.adapters.pattern_matching import match_names
from finetune.adapters.peft_config import PEFT_CONFIG
from finetune.adapters.peft_folder import PeftFolder, open_peft_folder
from finetune.adapters.peft_weights import PeftWeights, check_layers
from finetune.adapters.projections import (
    PROJECTIONS_FILE,
    Projections,
    read_projections,
)
from finetune.adapters.scaling import end_patterns
from finetune.adapters.targets import (
    layer_patterns,
    resolve_layer_patterns,
    resolve_saved,
    resolve_targets,
    value_patterns,
)
from finetune.adapters.update_tensors import LOKR, VERA
from finetune.checkpoints.tensors_of_ranks import family_of, find_local_split
from finetune.errors import UserError
from finetune.families.family import Family
from finetune.models.hf_names import embedding_name, is_tied
from finetune.models.local_layers import is_stage
from finetune.storage.dtypes import as_float32
from finetune.storage.files import is_present, read_json_object

_FIELDS = frozenset(each.name for each in fields_of(LayeredLoRAConfig))


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
    modules = modules_of(model, family)
    targets = list(family.lora_target_modules)
    if settings.lora_target_modules:
        layers, linear = adaptable(modules, family)
        targets = resolve_targets(settings.lora_target_modules, family, layers, linear)
    saved = resolve_saved(settings.modules_to_save, family, modules) if settings.modules_to_save else None
    if saved:
        check_saved_modules(modules, saved, targets=targets)
        check_not_packed(modules, saved)
    trained = trained_whole(model, saved or ())
    trained += _bias_patterns(model, settings.lora_bias, targets)
    layers = [name for name in modules if any(re.fullmatch(each, name) for each in targets)]
    check_embedding(layers, settings, model.config, family)
    config = LayeredLoRAConfig(
        target_modules=targets,
        trainable_modules=trained or None,
        use_dora=settings.use_dora,
        lora_use_mixer=settings.lora_use_mixer,
        lora_bias=settings.lora_bias,
        init_lora_weights="pissa"
        if settings.pissa and settings.init_lora_weights == "default"
        else settings.init_lora_weights,
        rank_pattern=resolve_layer_patterns("rank_pattern", settings.rank_pattern, family, layers),
        alpha_pattern=resolve_layer_patterns("alpha_pattern", settings.alpha_pattern, family, layers),
        **kind_fields(settings),
        lora_dropout=settings.lora_dropout,
        rslora=settings.rslora,
        lora_plus_scale=settings.lora_plus_scale,
        pissa=settings.pissa or settings.init_lora_weights.startswith("pissa"),
        merge_weights=False,
        dtype=settings.lora_dtype or dtype,
        base_model_name_or_path=str(settings.model_name_or_path),
    )
    return LoRAModel(model, config, seed=seed)


def _bias_patterns(model: Any, which: str, targets: list[str]) -> list[str]:
    """Patterns of the biases that are trained."""
    if which == "none":
        return []
    patterns = [rf".*{BIAS_ENDING}"] if which == "all" else [rf"(?:{each}){BIAS_ENDING}" for each in targets]
    if not any(match_names(patterns, list(model.state_dict()))):
        raise UserError(
            f"lora_bias is {which}, but the layers in question have no biases in this model: set it to none"
        )
    return patterns


def load_lora(
    model: Any,
    folder: Path,
    *,
    modules_to_save: list[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> LoRAModel:
    """Puts a saved adapter on a model, trainable again, in the dtype of the model.

    It may be of this project, of PaddleNLP or of peft. One of peft is from then on as if PaddleNLP had written it.

    Args:
        model: The model that it was trained on.
        folder: The adapter's folder.
        modules_to_save: Modules that the run wants trained whole; None for those of the adapter.
        overrides: Fields of PaddleNLP's configuration that say how and on what it is trained further: `lora_dropout`,
            `lora_plus_scale`, `base_model_name_or_path`; by default as before. `dtype` is by default the model's.

    Raises:
        UserError: The folder holds no adapter, one of another shape, or one that trains other modules whole.
    """
    weights: AdapterWeights | None = None
    source: PeftFolder | None = None
    if is_present(folder / LORA_CONFIG):
        fields = read_json_object(folder / LORA_CONFIG)
        check_paddle_lora(folder, fields)
        fields.pop("scaling", None)
    elif is_present(folder / PEFT_CONFIG):
        fields, weights, source = _convert_peft(model, folder, family_of(model.config))
    else:
        raise UserError(
            f"lora_path {folder} holds neither {LORA_CONFIG} nor {PEFT_CONFIG}: point it at the output folder "
            "(or a checkpoint) of a LoRA run, or at an adapter of peft."
        )
    family = family_of(model.config)
    saved = modules_to_save and resolve_saved(modules_to_save, family, modules_of(model, family))
    if (
        saved
        and set(trained_whole(model, saved))
        != LayeredLoRAConfig(**{name: fields[name] for name in _FIELDS if name in fields}).saved_patterns
    ):
        raise UserError(
            f"modules_to_save is {', '.join(modules_to_save or ())}, but the adapter in lora_path {folder} was "
            f"trained with {fields.get('trainable_modules') or 'none'}: remove modules_to_save to go on with "
            "the adapter's, or start a new one"
        )
    # Whatever it was trained in, the run says which type it goes on in.
    fields |= {"dtype": model.config.dtype, **(overrides or {})}
    config = LayeredLoRAConfig(**{name: fields[name] for name in _FIELDS if name in fields})
    _check_time(model, config)
    projections = _find_projections(model, config, folder, source) if config.vera else None
    adapted = LoRAModel(model, config, starts=open_starts(folder, model.config), projections=projections)
    load_adapter_weights(adapted, folder, weights, is_stage=is_stage(model))
    return adapted


def _find_projections(
    model: Any, config: LayeredLoRAConfig, folder: Path, source: PeftFolder | None
) -> Projections | None:
    """VeRA's shared matrices of a saved adapter; None where the key makes them."""
    num_in, num_out = adapted_sizes(model, config.target_modules)
    if source:
        return source.find_projections(num_in=num_in, num_out=num_out)
    if found := read_projections(folder):
        found.check(folder / PROJECTIONS_FILE, rank=config.r, num_in=num_in, num_out=num_out)
    return found


def _check_time(model: Any, config: LayeredLoRAConfig) -> None:
    """Matches an adapter's patterns once in bounded time, as PaddleNLP will match them without a bound."""
    layers = [name for name, _ in model.named_sublayers()]
    for patterns, names in (
        (config.target_modules, layers),
        (end_patterns([*config.rank_pattern, *config.alpha_pattern]), layers),
        (config.trainable_modules, list(model.state_dict())),
    ):
        match_names([patterns] if isinstance(patterns, str) else patterns or [], names)


def _convert_peft(model: Any, folder: Path, family: Family) -> tuple[dict[str, Any], PeftWeights, PeftFolder]:
    """PaddleNLP's configuration and the weights of an adapter that peft wrote."""
    tied = is_tied(model.config.to_dict(), family)
    source = open_peft_folder(folder, family, tied=tied)
    weights = PeftWeights(source, family, tied=tied)
    modules = modules_of(model, family)
    linear = adaptable(modules, family)[1]
    _drop_frozen_table(model, folder, weights, family)
    table = embedding_name(family).removesuffix(".weight")
    check_layers(folder, weights, [*linear, table])
    if source.rule.dora and table in weights.ranks:
        raise UserError(
            f"the adapter in {folder} has use_dora and updates {table}, and DoRA of an embedding is not computed here: "
            f"merge it (merge_lora_params.py --lora_path {folder}) and use the result"
        )
    linear = [*linear, table]
    fields = {
        "target_modules": layer_patterns(weights.ranks, linear),
        "trainable_modules": whole_patterns(weights.whole, modules) or None,
        "r": source.rule.rank,
        "lora_alpha": source.rule.alpha,
        "rslora": source.rule.rslora,
        "use_dora": source.rule.dora,
        "rank_pattern": value_patterns(weights.ranks, linear, common=source.rule.rank),
        "alpha_pattern": value_patterns(weights.alphas, linear, common=source.rule.alpha),
        "lora_dropout": float(source.config.get("lora_dropout") or 0.0),
        "base_model_name_or_path": source.config.get("base_model_name_or_path"),
    }
    if source.rule.kind == VERA:
        fields |= {
            "vera": True,
            "projection_prng_key": int(source.config.get("projection_prng_key") or 0),
            "d_initial": float(source.config.get("d_initial") or 0.0),
            "save_projection": bool(source.projections),
            "lora_dropout": float(source.config.get("vera_dropout") or 0.0),
        }
    if source.rule.kind == LOKR:
        fields |= {
            "lokr": True,
            "lokr_factor": int(source.config.get("decompose_factor", -1)),
            "decompose_both": bool(source.config.get("decompose_both")),
        }
    return fields, weights, source


def _drop_frozen_table(model: Any, folder: Path, weights: PeftWeights, family: Family) -> None:
    """Leaves out the copy of the embedding that peft writes beside an update of it, and does not train.

    Raises:
        UserError: It is not the embedding of this base.
    """
    name = embedding_name(family)
    layer = name.removesuffix(".weight")
    if layer not in weights.ranks or name not in weights.whole:
        return
    held = model.state_dict().get(name)  # on a stage of a pipeline it may be elsewhere
    if held is not None:
        copy, own = as_float32(weights.whole[name].tensor.load()), held.astype("float32").numpy()
        split, config = find_local_split(name, model.config), model.config
        if split:
            copy = split.part(copy, config.tensor_parallel_degree, config.tensor_parallel_rank)
        if copy.shape != own.shape or not np.allclose(copy, own, rtol=1e-2, atol=1e-6):
            raise UserError(
                f"the adapter in {folder} has an embedding of its own beside the update of it, and it is not that of this "
                "base: it was trained on another base, or with more tokens. Merge it (merge_lora_params.py), and go on "
                "with the merged model"
            )
    weights.whole = {each: stored for each, stored in weights.whole.items() if each != name}
