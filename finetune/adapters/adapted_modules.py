"""The modules of a model that LoRA adapts or trains whole, by name, whatever part of the model a process holds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from finetune.adapters.targets import layer_patterns
from finetune.checkpoints.tensors_of_ranks import family_of, find_local_split
from finetune.errors import UserError
from finetune.families.family import Family
from finetune.models.hf_names import is_tied
from finetune.models.layers import layer_list
from finetune.models.local_layers import is_stage, layer_numbers
from finetune.models.quantised.layers import is_packed
from finetune.models.reward_head import REWARD_HEAD, is_reward_model


def modules_of(model: Any, family: Family) -> dict[str, Any]:
    """Name -> module with weights of its own, of the whole model; modules of other stages are stubs or their like."""
    return dict(_weighted_modules(model, family.prefix_geometry(model.config).num_layers))


def adaptable(modules: Mapping[str, Any], family: Family) -> tuple[list[str], list[str]]:
    """Names of modules with a weight, and of those that a low-rank update can stand beside.

    What is on other stages of a pipeline is a stub without a weight, and no linear layer of a decoder.
    """
    layers = [
        name
        for name, layer in modules.items()
        if hasattr(layer, "weight") or getattr(layer, "is_placeholder", False)
    ]
    shapes = {name: getattr(getattr(modules[name], "weight", None), "shape", ()) for name in layers}
    ends = (family.embedding_module, family.head_module, REWARD_HEAD)
    linear = [name for name in layers if len(shapes[name]) == 2 and name.rpartition(".")[2] not in ends]
    return layers, linear


def adapted_sizes(model: Any, targets: Sequence[str]) -> tuple[int, int]:
    """The most rows and the most columns that a weight of the adapted layers has in the whole model.

    Args:
        model: PaddleNLP's, or one process's part of it.
        targets: Patterns of the adapted layers.
    """
    config = model.config
    sizes = []
    for name, layer in modules_of(model, family_of(config)).items():
        weight = getattr(layer, "weight", None)
        if weight is None or not any(re.fullmatch(each, name) for each in targets):
            continue
        split = find_local_split(f"{name}.weight", config)
        shape = tuple(weight.shape)
        sizes.append(split.whole_shape(shape, config.tensor_parallel_degree) if split else shape)
    return max(size[0] for size in sizes), max(size[1] for size in sizes)


def whole_patterns(names: Collection[str], modules: Collection[str]) -> list[str]:
    """Patterns for tensors that are trained whole; one for all parameters of a module where all of them are."""
    held = {name.rpartition(".")[0] for name in names if not name.endswith(".bias")}
    biases = [name for name in names if name.endswith(".bias") and name.removesuffix(".bias") not in held]
    names = [name for name in names if name not in biases]
    leaves = [name.rpartition(".")[0].rpartition(".")[2] for name in names]
    of_leaf = {leaf: {each for each in modules if each.rpartition(".")[2] == leaf} for leaf in leaves}
    patterns = layer_patterns(biases, biases)
    patterns += [
        saved_pattern(leaf) if of_leaf[leaf] <= held else re.escape(name)
        for leaf, name in zip(leaves, names, strict=True)
    ]
    return list(dict.fromkeys(patterns))


def saved_pattern(name: str) -> str:
    """PaddleNLP's pattern for all parameters of the modules whose names end in `name`."""
    return rf"(.*\.)?{re.escape(name)}\.[^.]+"


def trained_whole(model: Any, names: Collection[str]) -> list[str]:
    """PaddleNLP's patterns for the modules that are trained whole: the named ones, and the head of a reward model."""
    leaves = [*names, *[REWARD_HEAD] * is_reward_model(model)]
    return [saved_pattern(leaf) for leaf in dict.fromkeys(leaves)]


def check_embedding(layers: Collection[str], settings: Any, config: Any, family: Family) -> None:
    """Refuses an update of the embedding where it has none.

    Args:
        layers: Names of the adapted layers.
        settings: The model arguments.
        config: PaddleNLP's configuration of the model.
        family: Record of the model.

    Raises:
        UserError: The embedding is the output layer, too, or the update is none of plain LoRA's.
    """
    found = next((name for name in layers if name.rpartition(".")[2] == family.embedding_module), None)
    if found is None:
        return
    if is_tied(config.to_dict(), family):
        raise UserError(
            f"lora_target_modules: {found} is the output layer of this model as well, and an update (as in peft) would "
            "change one of its two uses: name it in modules_to_save to train it whole, or narrow the pattern"
        )
    kinds = ("vera", "lokr", "use_dora", "lora_use_mixer", "pissa")
    other = next((name for name in kinds if getattr(settings, name)), None)
    if settings.init_lora_weights.startswith(("pissa", "olora")):
        other = f"init_lora_weights {settings.init_lora_weights}"
    if other:
        raise UserError(
            f"lora_target_modules: {found} is an embedding, and {other} is for linear layers: leave {other} out, or "
            "narrow the pattern"
        )


def check_not_packed(modules: Mapping[str, Any], names: list[str]) -> None:
    """Refuses to train whole what is held in packed weights.

    Raises:
        UserError: With the names.
    """
    packed = {name.rpartition(".")[2] for name, layer in modules.items() if is_packed(layer)}
    if frozen := [name for name in names if name in packed]:
        raise UserError(
            f"modules_to_save: {', '.join(frozen)} is held in packed weights (weight_quantize_algo), which cannot be "
            "trained whole: adapt it with lora_target_modules, or train without weight_quantize_algo."
        )


def check_saved_modules(modules: Collection[str], names: list[str], *, targets: list[str]) -> None:
    """Every name must be that of a module with parameters, and of none that gets a low-rank update too.

    Raises:
        UserError: Names that fit nothing or both.
    """
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
