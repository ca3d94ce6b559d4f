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
from finetune.adapters.projections import Projections, draw_projections
from finetune.adapters.scaling import ScalingRule, end_patterns
from finetune.adapters.update_tensors import VERA, Matrices, check_update, name_parts
from finetune.errors import UserError
from finetune.families.family import Family
from finetune.models.hf_names import is_output, is_token_table, is_turned, to_paddle
from finetune.storage.checkpoints import TensorFiles
from finetune.storage.dtypes import as_float32
from finetune.storage.files import read_json_if_present
from finetune.storage.joined_tensors import JoinedTensor

WEIGHTS_STEM = "adapter_model"
FIRST_PART = "base_model.model."
_PROJECTION = re.compile(r"base_model\.vera_(?P<matrix>[AB])(?:\.default)?")
_OF_UPDATES = (".lora_", ".vera_", ".lokr_", "trainable_tokens")
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


@dataclass(frozen=True)
class PeftFolder:
    """An adapter that peft wrote.

    Attributes:
        path: The file of its weights.
        config: Its configuration file as found.
        rule: Rank and factor of its layers, by peft's names.
        matrices: peft's name of a layer -> its matrices, all there and of the rule's kind and rank.
        whole: PaddleNLP's name of a tensor -> what takes its place.
        projections: VeRA's shared matrices "A" [r, in] and "B" [out, r], where they were saved.
    """

    path: Path
    config: Mapping[str, Any]
    rule: ScalingRule
    matrices: Mapping[str, Matrices]
    whole: Mapping[str, WholeTensor]
    projections: Mapping[str, JoinedTensor] = field(default_factory=dict)

    def find_projections(self, *, num_in: int, num_out: int) -> Projections:
        """VeRA's shared matrices for layers of at most these sizes: those in the file, or those of the key.

        Raises:
            UserError: Those in the file are too small, or of another rank.
        """
        if self.projections:
            left, right = (as_float32(self.projections[name].load()).T for name in "AB")
            found = Projections(np.ascontiguousarray(left), np.ascontiguousarray(right))
        else:
            key = int(self.config.get("projection_prng_key") or 0)
            found = draw_projections(key, rank=self.rule.rank, num_in=num_in, num_out=num_out)
        found.check(self.path, rank=self.rule.rank, num_in=num_in, num_out=num_out)
        return found


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
    whole, projections = {}, {}
    for stored_name, tensor in TensorFiles([path]).tensors.items():
        name = stored_name.removeprefix(FIRST_PART)
        if parts := name_parts(name, is_peft=True):
            matrices.setdefault(parts[0], Matrices(path)).tensors[parts[1]] = tensor
        elif rule.kind == VERA and (match := _PROJECTION.fullmatch(name)):
            projections[match["matrix"]] = tensor
        elif any(word in name for word in _OF_UPDATES):
            raise UserError(
                f"{path} holds {stored_name}: more than a low-rank update, which is not read here. Merge it with "
                "peft's merge_and_unload, and use the merged model"
            )
        else:
            ours = to_paddle(_WRAPPERS.sub("", name), family)
            whole[ours] = WholeTensor(tensor, is_turned(ours, tensor.shape, family, tied=tied))
    if projections and len(projections) < len("AB"):
        raise UserError(f"{path} has one of vera_A and vera_B alone: copy the adapter again")
    if not matrices and not whole:
        raise UserError(f"{path} holds no tensors, so it changes nothing: copy the adapter again")
    check_patterns(folder / PEFT_CONFIG, rule, list(matrices))
    for layer, found in matrices.items():
        check_update(layer, found, rule, turned=True)
    if tied:
        _check_tied(path, whole, [to_paddle(layer, family) for layer in matrices])
    return PeftFolder(path, config, rule, matrices, whole, projections)


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
