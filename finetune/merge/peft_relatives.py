"""Adapters of LoRA's relatives in peft's form: their tensors as they are, and what their configuration says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.peft_folder import FIRST_PART
from finetune.adapters.update_tensors import LOKR, PREFIXES, VERA
from finetune.errors import UserError
from finetune.families.family import Family
from finetune.merge.lora_adapters import Adapter
from finetune.merge.row_blocks import stored_rows
from finetune.models.hf_names import joined_parts, to_hugging_face
from finetune.storage.dtypes import as_float32
from finetune.storage.writer import ComputedTensor, Tensor

_LABELS = {VERA: "VeRA", LOKR: "LoKr"}


def relative_tensors(adapter: Adapter, family: Family) -> list[Tensor]:
    """The tensors of an adapter of another kind than LoRA, under peft's names.

    Raises:
        UserError: A layer is joined here and apart at Hugging Face, values are not finite, or sizes do not fit.
    """
    kind = adapter.rule.kind
    if joined := next((layer for layer in adapter.updates if joined_parts(layer)), None):
        raise UserError(
            f"{adapter.folder} has one {_LABELS[kind]} update of {joined}, whose parts are layers of their own in Hugging Face's "
            "form, and peft cannot give them what they share. Merge it (--save_format hf)"
        )
    tensors: list[Tensor] = []
    for layer, found in adapter.matrices.items():
        name = f"{FIRST_PART}{to_hugging_face(layer, family)}"
        for end, tensor in found.tensors.items():
            if not np.isfinite(as_float32(tensor.load())).all():
                raise UserError(
                    f"{found.path} holds values that are not finite: the training diverged. Convert an earlier checkpoint"
                )
            tensors.append(replace(stored_rows(tensor), name=f"{name}.{PREFIXES[kind]}{end}"))
    if adapter.projections and saves_projection(adapter):
        for end, matrix in (("A", adapter.projections.left.T), ("B", adapter.projections.right.T)):
            tensors.append(
                ComputedTensor(f"base_model.vera_{end}", np.dtype("<f4"), matrix.shape, _one_block(matrix))
            )
    return tensors


def _one_block(matrix: NDArray[Any]) -> Callable[[], Iterator[NDArray[Any]]]:
    return lambda: iter([np.ascontiguousarray(matrix)])


def saves_projection(adapter: Adapter) -> bool:
    """Whether VeRA's shared matrices are in the files."""
    return bool(adapter.config.get("save_projection", adapter.is_peft))


def single_layers(adapter: Adapter, family: Family) -> dict[str, dict[str, float]]:
    """Ranks and alphas that are not the common ones, by peft's names of the layers."""
    rule, names = adapter.rule, {layer: to_hugging_face(layer, family) for layer in adapter.updates}
    ranks = {names[layer]: rule.rank_of(layer) for layer in names}
    alphas = {names[layer]: rule.alpha_of(layer) for layer in names}
    return {
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != rule.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != rule.alpha},
    }


def relative_config(adapter: Adapter, family: Family) -> dict[str, Any]:
    """What peft's configuration says of such an adapter beside the layers."""
    config = adapter.config
    if adapter.rule.kind == LOKR:
        factor = config.get("decompose_factor" if adapter.is_peft else "lokr_factor", -1)
        return {
            "peft_type": "LOKR",
            "r": adapter.rule.rank,
            "alpha": adapter.rule.alpha,
            "decompose_both": bool(config.get("decompose_both")),
            "decompose_factor": int(factor),
            **single_layers(adapter, family),
        }
    return {
        "peft_type": "VERA",
        "r": adapter.rule.rank,
        "projection_prng_key": int(config.get("projection_prng_key") or 0),
        "save_projection": saves_projection(adapter),
        "d_initial": float(config.get("d_initial") or 0.0),
        "vera_dropout": float(config.get("vera_dropout" if adapter.is_peft else "lora_dropout") or 0.0),
        "init_weights": True,
    }
