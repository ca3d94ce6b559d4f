"""An adapter of peft as PaddleNLP's LoRA layers hold one: under PaddleNLP's names, with turned matrices.

Every layer keeps the rank and the alpha that it has in peft, and with them its factor: further training goes on as it
would there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.peft_folder import PeftFolder, WholeTensor
from finetune.adapters.update_tensors import LORA, PREFIXES
from finetune.errors import UserError
from finetune.families.family import Family
from finetune.models.hf_names import is_output, is_token_table, to_paddle
from finetune.storage.joined_tensors import JoinedTensor

_MAX_LISTED = 6


@dataclass(frozen=True)
class _Factor:
    """One tensor of an update; the two matrices of LoRA are the transposes of PaddleNLP's."""

    tensor: JoinedTensor
    is_turned: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.is_turned else self.tensor.shape

    def read(self) -> NDArray[Any]:
        array = self.tensor.load()
        return np.ascontiguousarray(array.T if self.is_turned else array)


class PeftWeights:
    """Tensors by PaddleNLP's names, read when asked for.

    Args:
        source: The adapter.
        family: Record of its base.
        tied: Whether the base's output layer is its embedding.

    Attributes:
        ranks: PaddleNLP's names of the adapted layers -> their ranks.
        alphas: The same names -> their alphas.
        whole: PaddleNLP's names of the tensors that replace the base's -> those tensors.
        names: Every tensor's shape, by name.
    """

    def __init__(self, source: PeftFolder, family: Family, *, tied: bool):
        rule = source.rule
        self.ranks = {to_paddle(layer, family): rule.rank_of(layer) for layer in source.matrices}
        self.alphas = {to_paddle(layer, family): rule.alpha_of(layer) for layer in source.matrices}
        self.whole: Mapping[str, WholeTensor] = {
            name: stored
            for name, stored in source.whole.items()
            # With tied layers both names stand for one tensor, which the model knows as its embedding.
            if not (tied and is_output(name) and any(map(is_token_table, source.whole)))
        }
        self._factors: dict[str, _Factor] = {}
        for layer, found in source.matrices.items():
            name = to_paddle(layer, family)
            for end, tensor in found.tensors.items():
                turned = rule.kind == LORA and end in ("A", "B")
                self._factors[f"{name}.{PREFIXES[rule.kind]}{end}"] = _Factor(tensor, turned)

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape in PaddleNLP's form, by name."""
        shapes = {name: stored.tensor.shape for name, stored in self.whole.items()}
        turned = {
            name: shape[::-1] if self.whole[name].is_turned else shape for name, shape in shapes.items()
        }
        return {name: each.shape for name, each in self._factors.items()} | turned

    def read(self, name: str) -> NDArray[Any]:
        """The tensor of that name; bfloat16 as uint16."""
        if name in self._factors:
            return self._factors[name].read()
        stored = self.whole[name]
        array = stored.tensor.read()
        return array.T if stored.is_turned else array


def check_layers(folder: Path, weights: PeftWeights, linear: Iterable[str]) -> None:
    """Every adapted layer must be one of the model that can get a low-rank update beside it.

    Args:
        folder: Of the adapter, for the message.
        weights: The adapter.
        linear: PaddleNLP's names of the model's layers with such an update.

    Raises:
        UserError: Some are not.
    """
    known = set(linear)
    if not (others := [layer for layer in weights.ranks if layer not in known]):
        return
    listed = ", ".join(others[:_MAX_LISTED]) + f" and {len(others) - _MAX_LISTED} more" * (
        len(others) > _MAX_LISTED
    )
    raise UserError(
        f"the adapter in {folder} updates {listed}, which this model does not have as linear layers. Layers that are "
        "joined here (fuse_attention_qkv, fuse_attention_ffn) have to be apart: set both to false. Output "
        f"layers take up an update only when it is merged: merge_lora_params.py --lora_path {folder}. Otherwise "
        "it was trained on another base"
    )
