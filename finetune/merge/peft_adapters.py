"""Adapters in peft's form, `adapter_config.json` and `adapter_model.safetensors`: read for a merge, and written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.peft_config import PEFT_CONFIG, SEQUENCE_CLASSIFICATION
from finetune.adapters.peft_folder import FIRST_PART, PeftFolder, WholeTensor, open_peft_folder
from finetune.adapters.peft_weights import PeftWeights
from finetune.adapters.scaling import ScalingRule
from finetune.adapters.targets import value_patterns
from finetune.adapters.update_tensors import LOKR, LORA, VERA, name_parts
from finetune.errors import UserError
from finetune.families.family import Family
from finetune.families.record_parts import OUTPUT_LAYER
from finetune.merge.layer_updates import LayerTensors, unknown_inputs
from finetune.merge.lora_adapters import Adapter
from finetune.merge.peft_relatives import relative_config, relative_tensors
from finetune.merge.row_blocks import AnyUpdate, Update, finite_factors, stored_rows, turned_rows
from finetune.models.hf_names import (
    embedding_name,
    is_output,
    is_turned,
    joined_columns,
    joined_parts,
    to_hugging_face,
    to_paddle,
)
from finetune.models.reward_head import REWARD_WEIGHT
from finetune.storage.files import write_json
from finetune.storage.writer import ComputedTensor, Tensor

_BIAS_OF_LAYERS = {LORA: "lora_only", VERA: "vera_only", LOKR: "lora_only"}
"""Kind -> what peft calls it when the biases of adapted layers are trained; it has no such field for LoKr."""


def read_peft_adapter(
    folder: Path, family: Family, *, tied: bool, num_inputs: Callable[[str], int] = unknown_inputs
) -> Adapter:
    """Reads an adapter that peft wrote; its tensors stay in their file.

    Args:
        folder: Of the adapter.
        family: Record of its base.
        tied: Whether the base's output layer is its embedding.
        num_inputs: Gives the rows of the base's weight of a layer, by PaddleNLP's name; 0 where it has none.

    Raises:
        UserError: Files are missing or damaged, or it is of a kind that cannot be merged here.
    """
    read = open_peft_folder(folder, family, tied=tied)

    def own_name(layer: str) -> str:
        return to_paddle(layer, family)

    # The same for an embedding: its A is [r, rows] and its B [width, r].
    layers = LayerTensors(
        read.matrices, read.rule, is_peft=True, own_name=own_name, num_inputs=num_inputs,
        find_projections=lambda num_in, num_out: read.find_projections(num_in=num_in, num_out=num_out),
    )  # fmt: skip
    updates, projections = layers.updates()
    matrices = {own_name(layer): found for layer, found in read.matrices.items()}
    return Adapter(
        folder, read.path, read.config, _own_rule(read, family), updates, read.whole,
        is_peft=True, matrices=matrices, projections=projections,
    )  # fmt: skip


def _own_rule(read: PeftFolder, family: Family) -> ScalingRule:
    """The rule of an adapter by PaddleNLP's names."""
    weights, rule = PeftWeights(read, family, tied=False), read.rule
    ranks = value_patterns(weights.ranks, list(weights.ranks), common=rule.rank)
    alphas = value_patterns(weights.alphas, list(weights.alphas), common=rule.alpha)
    return replace(rule, rank_pattern={name: int(rank) for name, rank in ranks.items()}, alpha_pattern=alphas)


def _factor_blocks(update: Update, divisor: float | None = None) -> Callable[[], Iterator[NDArray[Any]]]:
    """B of a layer in peft's form, or with a divisor its A."""

    def blocks() -> Iterator[NDArray[Any]]:
        left, right = finite_factors(update)
        yield right.T if divisor is None else left.T / np.float32(divisor)

    return blocks


def _length_blocks(read: Callable[[], NDArray[Any]]) -> Callable[[], Iterator[NDArray[Any]]]:
    return lambda: iter([read()])


def peft_rank(adapter: Adapter, layer: str) -> int:
    """Columns of A in peft's form: twice the rank where the update takes out what it started from."""
    return adapter.rule.rank_of(layer) * (2 if adapter.has_starts else 1)


def _peft_alpha(adapter: Adapter, layer: str) -> float:
    """Alpha that gives a layer its factor at its rank in peft's form."""
    rule = adapter.rule
    if not adapter.has_starts:
        return rule.alpha_of(layer)
    rank = peft_rank(adapter, layer)
    return rule.factor_of(layer) * (math.sqrt(rank) if rule.rslora else rank)


def peft_tensors(adapter: Adapter, family: Family, config: Mapping[str, Any], *, tied: bool) -> list[Tensor]:
    """An adapter's tensors as peft names and turns them; low-rank matrices in float32.

    Layers that are joined here and apart at Hugging Face share A; each gets its columns of B.

    Args:
        adapter: The adapter.
        family: Record of its base.
        config: Configuration of the base as the family adapts it; needed for joined layers only.
        tied: Whether the base's output layer is its embedding.
    """
    tensors: list[Tensor] = []
    if tied and (layers := [name for name in adapter.updates if is_output(name) or _is_table(name, family)]):
        raise UserError(
            f"{adapter.folder} has a low-rank update of {layers[0]}, but embedding and output layer of this base are "
            "one tensor, of which peft would change one use alone. Merge it (--save_format hf)"
        )
    if adapter.rule.kind == LORA:
        tensors += _lora_tensors(adapter, family, config)
    else:
        tensors += relative_tensors(adapter, family)
    for name, stored in _both_names(adapter.whole, family) if tied else adapter.whole.items():
        rows = stored_rows(stored.tensor)
        turned = is_turned(name, stored.tensor.shape, family, tied=tied)
        rows = rows if turned == stored.is_turned else turned_rows(rows)
        theirs = to_hugging_face(name, family)
        if name.endswith(".bias") and name.removesuffix(".bias") in adapter.updates:
            theirs = f"{theirs.removesuffix('.bias')}.base_layer.bias"
        tensors.append(replace(rows, name=f"{FIRST_PART}{theirs}"))
    return tensors


def _lora_tensors(adapter: Adapter, family: Family, config: Mapping[str, Any]) -> Iterator[Tensor]:
    """A and B of all layers, and the lengths of DoRA."""
    for layer, update in adapter.updates.items():
        rank, factor = peft_rank(adapter, layer), adapter.rule.factor_of(layer)
        for part, each in split_joined(layer, update, config, family):
            name = f"{FIRST_PART}{to_hugging_face(part, family)}"
            assert isinstance(each, Update)
            dtype, shapes = np.dtype("<f4"), ((rank, each.shape[0]), (each.shape[1], rank))
            is_table = _is_table(layer, family)
            ends = ("embedding_A", "embedding_B") if is_table else ("A.weight", "B.weight")
            yield ComputedTensor(f"{name}.lora_{ends[0]}", dtype, shapes[0], _factor_blocks(each, factor))
            yield ComputedTensor(f"{name}.lora_{ends[1]}", dtype, shapes[1], _factor_blocks(each))
            if (read := each.lengths) is not None:
                blocks = _length_blocks(read)
                yield ComputedTensor(f"{name}.lora_magnitude_vector", dtype, (each.shape[1],), blocks)


def _is_table(name: str, family: Family) -> bool:
    return f"{name.removesuffix('.weight')}.weight" == embedding_name(family)


def _both_names(whole: Mapping[str, WholeTensor], family: Family) -> list[tuple[str, WholeTensor]]:
    """A tied embedding under the names of both its uses: peft copies each module, which parts them."""
    shared = [
        name for name in whole if _is_table(name, family) or (is_output(name) and name.endswith("weight"))
    ]
    others = [(name, stored) for name, stored in whole.items() if name not in shared]
    if not shared:
        return others
    return [
        *others,
        *((name, whole[shared[0]]) for name in (embedding_name(family), f"{OUTPUT_LAYER}.weight")),
    ]


def split_joined(
    layer: str, update: AnyUpdate, config: Mapping[str, Any], family: Family
) -> Sequence[tuple[str, AnyUpdate]]:
    """The update of each part of a joined layer, or the one update of any other."""
    parts = joined_parts(layer)
    if not parts:
        return [(layer, update)]
    columns = joined_columns(layer, update.shape[1], config, family)
    return [(part, update.columns(chosen)) for part, chosen in zip(parts, columns, strict=True)]


def write_peft_config(
    adapter: Adapter, tensors: Sequence[Tensor], folder: Path, *, family: Family, base: str | None
) -> None:
    """Writes `adapter_config.json` for the tensors of `peft_tensors`."""
    parts = [part for layer in adapter.updates for part in joined_parts(layer) or (layer,)]
    layers = [f"{FIRST_PART}{to_hugging_face(part, family)}" for part in parts]
    whole = [tensor.name.rpartition(".")[0] for tensor in tensors if not _is_of_update(tensor.name)]
    weights = {tensor.name for tensor in tensors if tensor.name.endswith(".weight")}
    biases = {name for name in whole if f"{name}.weight" not in weights}
    whole = [name for name in whole if name not in biases]
    rule = adapter.rule
    of_layers = {f"{name}.base_layer" for name in layers}
    content: dict[str, Any] = {
        **(_lora_config(adapter, family) if rule.kind == LORA else relative_config(adapter, family)),
        "task_type": SEQUENCE_CLASSIFICATION if REWARD_WEIGHT in adapter.whole else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none" if not biases else _BIAS_OF_LAYERS[rule.kind] if biases <= of_layers else "all",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.removeprefix(FIRST_PART) for name in layers}),
        "modules_to_save": sorted({name.rpartition(".")[2] for name in whole}) or None,
    }
    write_json(folder / PEFT_CONFIG, content)


def _is_of_update(name: str) -> bool:
    """Whether a tensor of `peft_tensors` is a part of an update, not one that was trained whole."""
    inner = name.removeprefix(FIRST_PART)
    return inner.startswith("base_model.vera_") or name_parts(inner, is_peft=True) is not None


def _lora_config(adapter: Adapter, family: Family) -> dict[str, Any]:
    """What the configuration of a LoRA adapter says of ranks and factors."""
    rule = adapter.rule
    ranks, alphas = {}, {}
    for layer in adapter.updates:
        for name in (to_hugging_face(part, family) for part in joined_parts(layer) or (layer,)):
            ranks[name] = peft_rank(adapter, layer)
            alphas[name] = _peft_alpha(adapter, layer)
    return {
        "peft_type": "LORA",
        "r": rule.rank,
        "lora_alpha": rule.alpha,
        "use_dora": rule.dora,
        "lora_dropout": float(adapter.config.get("lora_dropout") or 0.0),
        "use_rslora": rule.rslora,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != rule.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != rule.alpha},
    }
