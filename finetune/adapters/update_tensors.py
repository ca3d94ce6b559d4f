"""The tensors that make the update of one layer, by kind: their names in files, and their shapes.

    lora    lora_A [in, r], lora_B [r, out]; lora_AB [r, r] (MosLoRA), lora_magnitude [out] (DoRA) besides
    lokr    lokr_w1 [l, m] or lokr_w1_a [l, r], lokr_w1_b [r, m]; lokr_w2 likewise (`kronecker.py`)
    vera    vera_lambda_d [r], vera_lambda_b [out]; A and B are shared (`projections.py`)

peft has A and B of LoRA turned, and ends some names differently. Nothing is imported that a merge could do without.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from finetune.adapters.scaling import ScalingRule
from finetune.errors import UserError
from finetune.storage.joined_tensors import JoinedTensor

LORA, VERA, LOKR = "lora", "vera", "lokr"
PREFIXES = {LORA: "lora_", VERA: "vera_lambda_", LOKR: "lokr_"}
"""Kind -> what begins the last part of its tensors' names."""
_OURS = re.compile(
    r"(?P<layer>.+)\.(?:lora_(?P<lora>A|B|AB|magnitude)|vera_lambda_(?P<vera>d|b)|lokr_(?P<lokr>w[12](?:_[ab])?))"
)
_PEFTS = re.compile(
    r"(?P<layer>.+)\.(?:lora_(?:embedding_)?(?P<lora>[AB]|magnitude)(?:_vector)?|vera_lambda_(?P<vera>d|b)"
    r"|lokr_(?P<lokr>w[12](?:_[ab])?))(?:\.default)?(?:\.weight)?"
)


@dataclass
class Matrices:
    """What has been found of one layer's update.

    Attributes:
        path: A file that holds some of it.
        tensors: By the end of the name: "A", "B", "AB" and "magnitude" of LoRA, "d" and "b" of VeRA, "w1", "w2" and their
            parts of LoKr.
    """

    path: Path
    tensors: dict[str, JoinedTensor] = field(default_factory=dict)


def name_parts(name: str, *, is_peft: bool = False) -> tuple[str, str] | None:
    """Layer and end of the name of an update's tensor; None for any other tensor.

    Args:
        name: In a file; peft's without its first part.
        is_peft: Whether peft wrote it.
    """
    match = (_PEFTS if is_peft else _OURS).fullmatch(name)
    if match is None:
        return None
    return match["layer"], next(filter(None, match.groups()[1:]))


def check_update(layer: str, found: Matrices, rule: ScalingRule, *, turned: bool) -> tuple[int | None, int]:
    """Sizes [in, out] of the weight that an update is for; None where the update does not tell.

    Args:
        layer: Name for messages and for the rule's patterns.
        found: Its tensors.
        rule: Kind and rank on record.
        turned: Whether A is stored as [r, in] and B as [out, r].

    Raises:
        UserError: Tensors are missing, of another kind, or of shapes that are not those on record.
    """
    return _CHECKS[rule.kind](layer, found, rule, turned)


def _check_lora(layer: str, found: Matrices, rule: ScalingRule, turned: bool) -> tuple[int, int]:
    magnitude = found.tensors.get("magnitude")
    if (magnitude is not None) != rule.dora:
        raise UserError(
            f"{found.path}: {layer} has {'lengths' if magnitude else 'no lengths'} of columns, but the configuration "
            f"has use_dora {str(rule.dora).lower()}: weights and configuration are of different adapters. Copy both from "
            "the same run"
        )
    rank = rule.rank_of(layer)
    tensors = {name: tensor for name, tensor in found.tensors.items() if name != "magnitude"}
    _check_names(layer, found, ("A", "B"), prefix="lora_")
    shapes = {
        name: tensor.shape[::-1] if turned and name != "AB" else tensor.shape
        for name, tensor in tensors.items()
    }
    fits = all(len(shape) == 2 for shape in shapes.values()) and (
        shapes["A"][1] == shapes["B"][0] == rank and shapes.get("AB", (rank, rank)) == (rank, rank)
    )
    if not fits:
        raise _misfit(layer, found, rank, prefix="lora_")
    num_in, num_out = shapes["A"][0], shapes["B"][1]
    if magnitude is not None and magnitude.shape != (num_out,):
        raise UserError(f"{found.path}: {layer} has lengths {list(magnitude.shape)} for {num_out} columns")
    return num_in, num_out


def _check_vera(layer: str, found: Matrices, rule: ScalingRule, turned: bool) -> tuple[None, int]:
    _check_names(layer, found, ("d", "b"), prefix="vera_lambda_")
    outer, rank = found.tensors["b"].shape, rule.rank_of(layer)
    if found.tensors["d"].shape != (rank,) or len(outer) != 1:
        raise _misfit(layer, found, rank, prefix="vera_lambda_")
    return None, outer[0]


def _check_lokr(layer: str, found: Matrices, rule: ScalingRule, turned: bool) -> tuple[int, int]:
    rank, sizes = rule.rank_of(layer), []
    for name in ("w1", "w2"):
        parts = (name,) if name in found.tensors else (f"{name}_a", f"{name}_b")
        _check_names(layer, found, parts, prefix="lokr_")
        shapes = [found.tensors[each].shape for each in parts]
        fits = all(len(shape) == 2 for shape in shapes) and (
            len(shapes) == 1 or shapes[0][1] == shapes[1][0] == rank
        )
        if not fits or any(f"{name}_{end}" in found.tensors for end in "ab" if len(parts) == 1):
            raise _misfit(layer, found, rank, prefix="lokr_")
        sizes.append((shapes[0][0], shapes[-1][1]))
    return sizes[0][1] * sizes[1][1], sizes[0][0] * sizes[1][0]


_CHECKS = {LORA: _check_lora, VERA: _check_vera, LOKR: _check_lokr}


def _check_names(layer: str, found: Matrices, needed: tuple[str, ...], *, prefix: str) -> None:
    if missing := [name for name in needed if name not in found.tensors]:
        raise UserError(f"{found.path} lacks {prefix}{missing[0]} of {layer}: copy the adapter again")


def _misfit(layer: str, found: Matrices, rank: int, *, prefix: str) -> UserError:
    listed = ", ".join(
        f"{prefix}{name} {list(tensor.shape)}"
        for name, tensor in sorted(found.tensors.items())
        if name != "magnitude"
    )
    return UserError(
        f"{found.path}: {layer} has {listed}, but the adapter's configuration tells of rank {rank}: weights "
        "and configuration are of different adapters. Copy both from the same run"
    )
