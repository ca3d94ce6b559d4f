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

import paddle
from paddlenlp import peft

from finetune.adapters.adapted_modules import (
    adaptable,
    adapted_sizes,
    check_not_packed,
    check_saved_modules,
    modules_of,
    trained_whole,
    whole_patterns,
)
from finetune.adapters.adapter_folder import LORA_CONFIG, check_paddle_lora
from finetune.adapters.dora import add_magnitude
from finetune.adapters.files import AdapterWeights, StartWeights, load_adapter_weights, open_starts
from finetune.adapters.initial_weights import draw_input_matrix, find_start, take_start
from finetune.adapters.lora_config import BIAS_ENDING, LayeredLoRAConfig
from finetune.adapters.mixed_lora import add_mixer
from finetune.adapters.pattern_matching import match_names
from finetune.adapters.peft_config import PEFT_CONFIG
from finetune.adapters.peft_folder import PeftFolder, open_peft_folder
from finetune.adapters.peft_weights import PeftWeights, check_layers
from finetune.adapters.projections import (
    PROJECTIONS_FILE,
    Projections,
    draw_projections,
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
from finetune.adapters.update_tensors import VERA
from finetune.adapters.vera import LocalProjections, add_vectors
from finetune.checkpoints.tensors_of_ranks import family_of, find_local_split
from finetune.errors import UserError
from finetune.families.family import Family
from finetune.machine.randomness.seeding import derive_seed
from finetune.models.hf_names import is_tied
from finetune.models.local_layers import is_stage
from finetune.models.quantised.layers import hold_packed, is_packed, release_packed
from finetune.storage.files import is_present, read_json_object

_FIELDS = frozenset(each.name for each in fields_of(LayeredLoRAConfig))


class LoRAModel(peft.LoRAModel):
    """PaddleNLP's, for a model that may be one process's part of a larger one.

    Args:
        model: The model with its weights.
        config: The adapter's settings.
        seed: The seed of the run. Every A is drawn whole by its module's name and then cut, so that it does
            not depend on how the model is divided.
        starts: What the matrices of a saved adapter started from, where that has left the base's weights; found
            again by default.
        projections: The shared matrices of a saved VeRA adapter; made from the configuration's key by default.
    """

    def __init__(
        self,
        model: Any,
        config: LayeredLoRAConfig,
        *,
        seed: int = 0,
        starts: StartWeights | None = None,
        projections: Projections | None = None,
    ):
        if config.vera and projections is None:
            num_in, num_out = adapted_sizes(model, config.target_modules)
            key = config.projection_prng_key
            projections = draw_projections(key, rank=config.r, num_in=num_in, num_out=num_out)
        config.tensor_parallel_degree = model.config.tensor_parallel_degree  # PaddleNLP warns otherwise
        # PaddleNLP has the matrix between A and B in one process only.
        is_mixed, config.lora_use_mixer = config.lora_use_mixer, False
        super().__init__(model, config)
        config.lora_use_mixer = is_mixed
        self.projections = LocalProjections(projections, model.config) if projections else None
        for name, layer in model.named_sublayers():
            if getattr(layer, "lora_A", None) is not None:
                self._start_layer(name, layer, seed=derive_seed(seed, "lora", name), starts=starts)

    def _start_layer(self, name: str, layer: Any, *, seed: int, starts: StartWeights | None) -> None:
        config, base = self.lora_config, self.model.config
        if self.projections:
            add_vectors(name, layer, self.projections, rank=config.r, d_initial=config.d_initial)
            return
        layer.scaling = config.rule.factor_of(name)
        if config.changes_base:
            _check_start_rank(name, layer, base, config)
            found = starts.read(name) if starts else find_start(name, layer, base, kind=config.start)
            layer.start_factors = take_start(name, layer, base, found)
        else:
            draw_input_matrix(layer.lora_A, base, kind=config.start, seed=seed)
        if config.lora_use_mixer:
            add_mixer(layer, seed=seed)
        if config.use_dora:
            add_magnitude(layer)

    def _find_and_replace_module(
        self, model: Any, module_name: str, lora_config: LayeredLoRAConfig, enable_lora: Any
    ) -> None:
        layer = model.get_sublayer(module_name)
        if getattr(layer, "is_placeholder", False):
            return
        own = lora_config.of_layer(module_name)
        try:
            if is_packed(layer):
                self._replace_packed(model, module_name, own, enable_lora)
            else:
                super()._find_and_replace_module(model, module_name, own, enable_lora)
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


def _check_start_rank(name: str, layer: Any, base: Any, config: LayeredLoRAConfig) -> None:
    """A matrix has no more singular vectors, or orthogonal columns, than its smaller side is long."""
    split = find_local_split(f"{name}.weight", base)
    shape = (
        split.whole_shape(tuple(layer.weight.shape), base.tensor_parallel_degree)
        if split
        else layer.weight.shape
    )
    if layer.r > min(shape):
        raise UserError(
            f"lora_rank is {layer.r}, but {config.start} needs at most {min(shape)} for {name}, a matrix of "
            f"{list(shape)}: lower lora_rank, or start from something else"
        )


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
    config = LayeredLoRAConfig(
        target_modules=targets,
        trainable_modules=trained or None,
        use_dora=settings.use_dora,
        lora_use_mixer=settings.lora_use_mixer,
        lora_bias=settings.lora_bias,
        init_lora_weights="pissa" if settings.pissa else settings.init_lora_weights,
        rank_pattern=resolve_layer_patterns("rank_pattern", settings.rank_pattern, family, layers),
        alpha_pattern=resolve_layer_patterns("alpha_pattern", settings.alpha_pattern, family, layers),
        **_kind_fields(settings),
        lora_dropout=settings.lora_dropout,
        rslora=settings.rslora,
        lora_plus_scale=settings.lora_plus_scale,
        pissa=settings.pissa or settings.init_lora_weights == "pissa",
        merge_weights=False,
        dtype=settings.lora_dtype or dtype,
        base_model_name_or_path=str(settings.model_name_or_path),
    )
    return LoRAModel(model, config, seed=seed)


def _kind_fields(settings: Any) -> dict[str, Any]:
    """Rank and factor of the update, and what else its kind has."""
    if settings.vera:
        names = ("vera", "projection_prng_key", "d_initial", "save_projection")
        return {name: getattr(settings, name) for name in names} | _vera_rank(settings.vera_rank)
    return {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha}


def _vera_rank(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": float(rank)}  # a factor of 1


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
            `lora_plus_scale`, `base_model_name_or_path`; by default as before.

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
    # Whatever it was trained in: layers cannot multiply tensors of two types.
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
    check_layers(folder, weights, linear)
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
    return fields, weights, source
