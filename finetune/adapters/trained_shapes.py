"""What of a model is trained, and what an adapter adds to it, worked out from settings and config.json alone.

The names are those that the parameters have in one process, so that `find_split` divides them as it divides weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.adapters.adapter_folder import LORA_CONFIG, PREFIX_CONFIG, paddle_rule
from finetune.adapters.frozen_parts import choice_of, choose_trained
from finetune.adapters.kronecker import kronecker_shapes
from finetune.adapters.peft_config import PEFT_CONFIG, read_peft_rule
from finetune.adapters.scaling import ScalingRule
from finetune.adapters.targets import resolve_layer_patterns, resolve_saved, resolve_targets
from finetune.adapters.update_tensors import LOKR, LORA, VERA
from finetune.families.family import Family
from finetune.models.hf_names import is_tied
from finetune.models.reward_head import REWARD_HEAD
from finetune.models.weight_shapes import Shape
from finetune.storage.files import read_json_if_present, read_json_object

PREFIX_NAME = "prefix_encoder.0.weight"
"""Of the embedding of a prefix, which every process holds whole."""


@dataclass(frozen=True)
class TrainedShapes:
    """The parameters of a run.

    Attributes:
        model: Those of the model, by name.
        added: Those of the adapter, all of them trained.
        trained: Names of those of the model that are trained.
        adapted: Layers with a low-rank update, and its rank.
        shared: Matrices that layers share and nobody trains (VeRA).
        num_prefix_tokens: Keys and values in front of every row.
    """

    model: Mapping[str, Shape]
    added: Mapping[str, Shape] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    adapted: Mapping[str, int] = field(default_factory=dict)
    shared: tuple[Shape, ...] = ()
    num_prefix_tokens: int = 0

    @property
    def all(self) -> dict[str, Shape]:
        """Both kinds of parameters."""
        return {**self.model, **self.added}

    @property
    def updated(self) -> frozenset[str]:
        """Names of all that are trained."""
        return self.trained | frozenset(self.added)


def plan_trained(
    settings: Any, family: Family, config: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> TrainedShapes:
    """What a run with these model arguments trains.

    Args:
        settings: The model arguments.
        family: Record of the model.
        config: Its configuration as the family adapts it.
        shapes: Its parameters, from `weight_shapes`.

    Raises:
        UserError: A pattern fits nothing, or nothing is left to train.
    """
    if settings.prefix_tuning:
        return _with_prefix(settings, family, config, shapes)
    if settings.lora:
        return _with_lora(settings, family, shapes)
    choice = choice_of(settings)
    trained = set(shapes)
    if choice.is_made:
        sizes = {name: number_of(shape) for name, shape in shapes.items()}
        trained = choose_trained(choice, sizes, family, is_tied=is_tied(config, family))
    return TrainedShapes(shapes, trained=frozenset(trained))


def number_of(shape: Shape) -> int:
    """Elements of a tensor of this shape."""
    total = 1
    for size in shape:
        total *= size
    return total


def _with_prefix(
    settings: Any, family: Family, config: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> TrainedShapes:
    geometry, num_tokens = family.prefix_geometry(config), int(settings.num_prefix_tokens)
    if settings.prefix_path:
        saved = read_json_if_present(Path(settings.prefix_path) / PREFIX_CONFIG)
        num_tokens = int(saved.get("num_prefix_tokens") or num_tokens)
    width = geometry.num_layers * 2 * geometry.num_kv_heads * geometry.head_dim
    return TrainedShapes(shapes, added={PREFIX_NAME: (num_tokens, width)}, num_prefix_tokens=num_tokens)


@dataclass(frozen=True)
class _Update:
    """An update as settings or a saved adapter describe it."""

    rule: ScalingRule
    targets: list[str]
    saved: list[str]
    bias: str = "none"
    mixes: bool = False
    factor: int = -1
    decompose_both: bool = False


def _with_lora(settings: Any, family: Family, shapes: Mapping[str, Shape]) -> TrainedShapes:
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    ends = (family.embedding_module, family.head_module, REWARD_HEAD)
    linear = [
        name for name in layers if len(shapes[f"{name}.weight"]) == 2 and name.rpartition(".")[2] not in ends
    ]
    update = _saved_update(settings) if settings.lora_path else _new_update(settings, family)
    targets = update.targets
    if settings.lora_target_modules or settings.lora_path:
        targets = resolve_targets(targets, family, layers, linear)
    adapted = [name for name in layers if any(re.fullmatch(each, name) for each in targets)]
    adapted = [name for name in adapted if len(shapes[f"{name}.weight"]) == 2]
    rule = update.rule
    if not settings.lora_path and settings.rank_pattern:
        ranks = resolve_layer_patterns("rank_pattern", settings.rank_pattern, family, adapted)
        rule = replace(rule, rank_pattern=ranks)
    added: dict[str, Shape] = {}
    for name in adapted:
        added |= _update_of(name, shapes[f"{name}.weight"], replace(update, rule=rule))
    return TrainedShapes(
        shapes,
        added=added,
        trained=_trained_whole(update, family, shapes, adapted),
        adapted={name: rule.rank_of(name) for name in adapted},
        shared=_shared(rule, [shapes[f"{name}.weight"] for name in adapted]),
    )


def _new_update(settings: Any, family: Family) -> _Update:
    kind = VERA if settings.vera else LOKR if settings.lokr else LORA
    rank = {VERA: settings.vera_rank, LOKR: settings.lokr_dim, LORA: settings.lora_rank}[kind]
    rule = ScalingRule(int(rank), 1.0, False, False, dora=settings.use_dora, kind=kind)
    targets = settings.lora_target_modules or list(family.lora_target_modules)
    return _Update(
        rule=rule,
        targets=[targets] if isinstance(targets, str) else list(targets),
        saved=list(settings.modules_to_save or ()),
        bias=settings.lora_bias,
        mixes=settings.lora_use_mixer,
        factor=settings.lokr_factor,
        decompose_both=settings.decompose_both,
    )


def _saved_update(settings: Any) -> _Update:
    folder = Path(settings.lora_path)
    is_peft = not (folder / LORA_CONFIG).is_file()
    config = read_json_object(folder / (PEFT_CONFIG if is_peft else LORA_CONFIG))
    rule = read_peft_rule(folder, config) if is_peft else paddle_rule(config)
    targets = config.get("target_modules") or []
    saved = settings.modules_to_save or config.get("modules_to_save") or []
    return _Update(
        rule=rule,
        targets=[targets] if isinstance(targets, str) else list(targets),
        saved=list(saved),
        bias=str(config.get("bias" if is_peft else "lora_bias") or "none").replace("vera_only", "lora_only"),
        mixes=bool(config.get("lora_use_mixer")),
        factor=int(config.get("decompose_factor", config.get("lokr_factor", -1))),
        decompose_both=bool(config.get("decompose_both")),
    )


def _update_of(name: str, shape: Shape, update: _Update) -> dict[str, Shape]:
    rule, (num_in, num_out) = update.rule, shape
    rank = rule.rank_of(name)
    if rule.kind == VERA:
        return {f"{name}.vera_lambda_d": (rank,), f"{name}.vera_lambda_b": (num_out,)}
    if rule.kind == LOKR:
        matrices = kronecker_shapes(
            num_in, num_out, rank=rank, factor=update.factor, decompose_both=update.decompose_both
        )
        return {f"{name}.lokr_{end}": each for end, each in matrices.items()}
    found: dict[str, Shape] = {f"{name}.lora_A": (num_in, rank), f"{name}.lora_B": (rank, num_out)}
    if update.mixes:
        found[f"{name}.lora_AB"] = (rank, rank)
    if rule.dora:
        found[f"{name}.lora_magnitude"] = (num_out,)
    return found


def _trained_whole(
    update: _Update, family: Family, shapes: Mapping[str, Shape], adapted: Collection[str]
) -> frozenset[str]:
    """Modules that are trained whole, the head of a reward model, and biases."""
    modules = {name.rpartition(".")[0] for name in shapes}
    leaves = {*resolve_saved(update.saved, family, modules), REWARD_HEAD}
    found = {name for name in shapes if name.rpartition(".")[0].rpartition(".")[2] in leaves}
    biases = [name for name in shapes if name.endswith(".bias")]
    if update.bias == "all":
        found |= set(biases)
    elif update.bias == "lora_only":
        found |= {name for name in biases if name.removesuffix(".bias") in set(adapted)}
    return frozenset(found)


def _shared(rule: ScalingRule, shapes: Collection[Shape]) -> tuple[Shape, ...]:
    """VeRA's matrices, one for each size of a side; see `vera.LocalProjections`."""
    if rule.kind != VERA:
        return ()
    left = tuple((size, rule.rank) for size in sorted({shape[0] for shape in shapes}))
    return left + tuple((rule.rank, size) for size in sorted({shape[1] for shape in shapes}))
