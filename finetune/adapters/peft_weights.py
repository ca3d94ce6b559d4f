"""An adapter of peft as PaddleNLP's LoRA layers hold one: one rank and one factor for all layers, turned matrices.

peft may give every layer a rank and an alpha of its own. Here a smaller rank is filled up with zeros, in A and in B,
which adds nothing to the update and never will: the gradient of either is a product with the zeros of the other. A
layer's own factor goes into its B,

    factor_layer * A @ B = factor * A @ (B * factor_layer / factor),

and layers whose factor is that of all keep their B bit by bit. The others compute the same; trained further, their B
moves by the common factor from then on, so that the adapter can be saved in PaddleNLP's form, which has only one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.adapters.peft_folder import PeftFolder, WholeTensor, check_matrices
from finetune.adapters.scaling import ScalingRule, lora_scaling
from finetune.errors import UserError
from finetune.families.family import Family
from finetune.models.hf_names import is_output, is_token_table, to_paddle
from finetune.storage.dtypes import as_float32
from finetune.storage.joined_tensors import JoinedTensor

_MAX_LISTED = 6


@dataclass(frozen=True)
class _Factor:
    """One matrix in PaddleNLP's form: the transpose of peft's, filled up to the common rank."""

    tensor: JoinedTensor
    shape: tuple[int, ...]
    ratio: float = 1.0

    def read(self) -> NDArray[Any]:
        array = self.tensor.load().T
        if self.ratio != 1.0:
            array = as_float32(array) * np.float32(self.ratio)
        if array.shape == self.shape:
            return np.ascontiguousarray(array)
        padded = np.zeros(self.shape, array.dtype)
        padded[tuple(slice(size) for size in array.shape)] = array
        return padded


class PeftWeights:
    """Tensors by PaddleNLP's names, read when asked for.

    Args:
        source: The adapter.
        family: Record of its base.
        tied: Whether the base's output layer is its embedding.

    Attributes:
        rule: Rank and factor of all layers.
        layers: PaddleNLP's names of the adapted layers.
        whole: PaddleNLP's names of the tensors that replace the base's -> those tensors.
        names: Every tensor's shape, by name.
    """

    def __init__(self, source: PeftFolder, family: Family, *, tied: bool):
        ranks = {layer: source.rule.rank_of(layer) for layer in source.matrices}
        alpha = source.rule.alpha or 1.0  # a factor of zero could not be made into another layer's
        self.rule = ScalingRule(
            max(ranks.values(), default=source.rule.rank), alpha, rslora=source.rule.rslora
        )
        self.layers = [to_paddle(layer, family) for layer in source.matrices]
        self.whole: Mapping[str, WholeTensor] = {
            name: stored
            for name, stored in source.whole.items()
            # With tied layers both names stand for one tensor, which the model knows as its embedding.
            if not (tied and is_output(name) and any(map(is_token_table, source.whole)))
        }
        self._factors: dict[str, _Factor] = {}
        factor = lora_scaling(alpha, self.rule.rank, rslora=self.rule.rslora)
        for layer, found in source.matrices.items():
            shapes = check_matrices(layer, found, ranks[layer], turned=True)
            name, rank, own = to_paddle(layer, family), self.rule.rank, source.rule.factor_of(layer)
            ratio = 1.0 if own == factor else own / factor
            self._factors[f"{name}.lora_A"] = _Factor(found.tensors["A"], (shapes["A"][0], rank))
            if magnitude := found.tensors.get("magnitude"):
                self._factors[f"{name}.lora_magnitude"] = _Factor(magnitude, magnitude.shape)
            self._factors[f"{name}.lora_B"] = _Factor(found.tensors["B"], (rank, shapes["B"][1]), ratio)

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
    if not (others := [layer for layer in weights.layers if layer not in known]):
        return
    listed = ", ".join(others[:_MAX_LISTED]) + f" and {len(others) - _MAX_LISTED} more" * (
        len(others) > _MAX_LISTED
    )
    raise UserError(
        f"the adapter in {folder} updates {listed}, which this model does not have as linear layers. Layers that are "
        "joined here (fuse_attention_qkv, fuse_attention_ffn) have to be apart: set both to false. Embeddings and "
        f"output layers take up an update only when it is merged: merge_lora_params.py --lora_path {folder}. Otherwise "
        "it was trained on another base"
    )
