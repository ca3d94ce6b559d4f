"""The tensors of an adapter that peft wrote, under PaddleNLP's names; they stay in their file until they are read.

peft's names are Hugging Face's behind "base_model.model."; A is [r, in] and B [out, r], the transposes of
PaddleNLP's. Neither Paddle nor PyTorch is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finetune.adapters.pattern_matching import match_names
from finetune.adapters.peft_config import PEFT_CONFIG, read_peft_rule
from finetune.adapters.scaling import ScalingRule, end_patterns
from finetune.errors import UserError
from finetune.families.family import Family
from finetune.models.hf_names import is_output, is_token_table, is_turned, to_paddle
from finetune.storage.checkpoints import TensorFiles
from finetune.storage.files import read_json_if_present
from finetune.storage.joined_tensors import JoinedTensor

WEIGHTS_STEM = "adapter_model"
FIRST_PART = "base_model.model."
_MATRIX = re.compile(
    r"(?P<layer>.+)\.lora_(?:embedding_)?(?P<matrix>[AB]|magnitude)(?:_vector)?(?:\.default)?(?:\.weight)?"
)
_WRAPPERS = re.compile(r"\.(?:modules_to_save(?:\.default)?|original_module|base_layer|token_adapter)(?=\.)")


@dataclass(frozen=True)
class WholeTensor:
    """A tensor that replaces the base's.

    Attributes:
        tensor: Where it lies.
        is_turned: Whether it is stored as Hugging Face stores linear layers, [out, in].
    """

    tensor: JoinedTensor
    is_turned: bool = False


@dataclass
class Matrices:
    """What has been found of one layer's update.

    Attributes:
        path: A file that holds some of it.
        tensors: By the matrix: "A" and "B", and "AB" between them where it was trained so.
    """

    path: Path
    tensors: dict[str, JoinedTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PeftFolder:
    """An adapter that peft wrote.

    Attributes:
        path: The file of its weights.
        config: Its configuration file as found.
        rule: Rank and factor of its layers, by peft's names.
        matrices: peft's name of a layer -> its matrices, A and B both there and of the rule's rank.
        whole: PaddleNLP's name of a tensor -> what takes its place.
    """

    path: Path
    config: Mapping[str, Any]
    rule: ScalingRule
    matrices: Mapping[str, Matrices]
    whole: Mapping[str, WholeTensor]


def open_peft_folder(folder: Path, family: Family, *, tied: bool) -> PeftFolder:
    """Finds the tensors of a LoRA adapter of peft.

    Args:
        folder: Of the adapter.
        family: Record of its base.
        tied: Whether the base's output layer is its embedding.

    Raises:
        UserError: Files are missing or damaged, or it computes something else than low-rank updates.
    """
    config = read_json_if_present(folder / PEFT_CONFIG)
    rule = read_peft_rule(folder, config)
    path = _weights_path(folder)
    matrices: dict[str, Matrices] = {}
    whole = {}
    for stored_name, tensor in TensorFiles([path]).tensors.items():
        name = stored_name.removeprefix(FIRST_PART)
        if match := _MATRIX.fullmatch(name):
            found = matrices.setdefault(match["layer"], Matrices(path))
            found.tensors[match["matrix"]] = tensor
        elif ".lora_" in name or "trainable_tokens" in name:
            raise UserError(
                f"{path} holds {stored_name}: more than a low-rank update, which is not read here. Merge it with "
                "peft's merge_and_unload, and use the merged model"
            )
        else:
            ours = to_paddle(_WRAPPERS.sub("", name), family)
            whole[ours] = WholeTensor(tensor, is_turned(ours, tensor.shape, family, tied=tied))
    if not matrices and not whole:
        raise UserError(f"{path} holds no tensors, so it changes nothing: copy the adapter again")
    check_patterns(folder / PEFT_CONFIG, rule, list(matrices))
    for layer, found in matrices.items():
        if ("magnitude" in found.tensors) != rule.dora:
            raise UserError(
                f"{path}: {layer} does not fit use_dora {str(rule.dora).lower()} of the configuration: weights and "
                "configuration are of different adapters. Copy both from the same run"
            )
        check_matrices(layer, found, rule.rank_of(layer), turned=True)
    if tied:
        _check_tied(path, whole, [to_paddle(layer, family) for layer in matrices])
    return PeftFolder(path, config, rule, matrices, whole)


def check_patterns(path: Path, rule: ScalingRule, layers: list[str]) -> None:
    """Matches the patterns of single layers once in bounded time, as they will be matched from then on.

    Args:
        path: The configuration, for messages.
        rule: Has the patterns.
        layers: Names of the adapted layers.

    Raises:
        UserError: One is no expression, or takes too long.
    """
    for name, patterns in (("rank_pattern", rule.rank_pattern), ("alpha_pattern", rule.alpha_pattern)):
        try:
            match_names(end_patterns(patterns), layers)
        except UserError as error:
            raise UserError(f"{path} has a {name} that cannot be used: {error}") from None


def check_matrices(layer: str, found: Matrices, rank: int, *, turned: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's matrices as PaddleNLP has them, A [in, r] and B [r, out].

    Args:
        layer: Name for messages.
        found: Its matrices.
        rank: Its rank on record.
        turned: Whether A is stored as [r, in] and B as [out, r].

    Raises:
        UserError: One of the two is missing, or their shapes are not those of the rank on record.
    """
    tensors = {name: tensor for name, tensor in found.tensors.items() if name != "magnitude"}
    if missing := [name for name in ("A", "B") if name not in tensors]:
        raise UserError(f"{found.path} lacks lora_{missing[0]} of {layer}: copy the adapter again")
    shapes = {
        name: tensor.shape[::-1] if turned and name != "AB" else tensor.shape
        for name, tensor in tensors.items()
    }
    fits = all(len(shape) == 2 for shape in shapes.values()) and (
        shapes["A"][1] == shapes["B"][0] == rank and shapes.get("AB", (rank, rank)) == (rank, rank)
    )
    if not fits:
        listed = ", ".join(f"lora_{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
        raise UserError(
            f"{found.path}: {layer} has {listed}, but the adapter's configuration tells of rank {rank}: weights "
            "and configuration are of different adapters. Copy both from the same run"
        )
    return shapes


def _weights_path(folder: Path) -> Path:
    for ending in (".safetensors", ".bin"):
        if (path := folder / f"{WEIGHTS_STEM}{ending}").is_file():
            return path
    raise UserError(f"{folder} lacks {WEIGHTS_STEM}.safetensors, the weights of the adapter: copy it there")


def _check_tied(path: Path, whole: Mapping[str, WholeTensor], updated: Iterable[str]) -> None:
    """Refuses what would make two layers out of a tied one; peft trains a copy beside the original then."""
    heads = [name for name in whole if is_output(name)]
    tables = [name for name in whole if is_token_table(name)]
    same = len(heads) == len(tables) == 1 and np.array_equal(
        whole[heads[0]].tensor.load(), whole[tables[0]].tensor.load()
    )
    both = heads + tables + [name for name in updated if is_output(name) or is_token_table(name)]
    if both and not same:
        raise UserError(
            f"{path} changes {both[0]} alone, but embedding and output layer of this base are one tensor: merge it with "
            "peft's merge_and_unload, which makes two of them"
        )
