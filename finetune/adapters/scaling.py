"""The factor of a low-rank update W + factor * A @ B: one rule for training, merging and peft's format.

    alpha / r          Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021)
    alpha / sqrt(r)    Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (2023)
    1                  PiSSA, whose A and B start as parts of W itself (Meng et al., 2024)

Dropout has no part in it. Nothing is imported that a merge could do without.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


def lora_scaling(alpha: float, rank: int, *, rslora: bool = False, pissa: bool = False) -> float:
    """The factor for one layer.

    Args:
        alpha: The numerator.
        rank: Columns of A, which are the rows of B; at least 1.
        rslora: Whether the denominator is the root of the rank.
        pissa: Whether A and B carry their full weight, whatever alpha is.

    Raises:
        ValueError: The rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of a low-rank update is {rank}, but must be at least 1")
    if pissa:
        return 1.0
    return alpha / math.sqrt(rank) if rslora else alpha / rank


@dataclass(frozen=True)
class ScalingRule:
    """Rank and factor of every adapted layer.

    Attributes:
        rank: Of layers that no pattern names.
        alpha: The same.
        rslora: See `lora_scaling`.
        pissa: The same.
        dora: Whether columns of the updated weights have trained lengths.
        kind: Which matrices make the update (`update_tensors.py`).
        rank_pattern: End of a layer's name, as a regular expression -> rank; peft's field.
        alpha_pattern: The same for alpha.
    """

    rank: int
    alpha: float
    rslora: bool = False
    pissa: bool = False
    dora: bool = field(default=False, kw_only=True)
    kind: str = field(default="lora", kw_only=True)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, layer: str) -> int:
        """Rank of the layer of that name."""
        return int(_first_match(self.rank_pattern, layer, self.rank))

    def alpha_of(self, layer: str) -> float:
        """Alpha of the layer of that name."""
        return float(_first_match(self.alpha_pattern, layer, self.alpha))

    def factor_of(self, layer: str) -> float:
        """Factor of the layer of that name."""
        return lora_scaling(self.alpha_of(layer), self.rank_of(layer), rslora=self.rslora, pissa=self.pissa)


def end_patterns(patterns: Iterable[str]) -> list[str]:
    """Expressions for whole names where the given ones are for the ends of names, from a dot on."""
    return [rf"(.*\.)?({pattern})" for pattern in patterns]


def _first_match(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """As peft looks patterns up: the first whose expression fits the end of the name from a dot on."""
    for pattern, whole in zip(patterns, end_patterns(patterns), strict=True):
        if re.fullmatch(whole, layer):
            return patterns[pattern]
    return default
