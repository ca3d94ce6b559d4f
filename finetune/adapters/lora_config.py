"""PaddleNLP's configuration of LoRA with what PaddleNLP does not know; all of it stands in lora_config.json.

`rank_pattern` and `alpha_pattern` are peft's fields for PaddleNLP's names: a regular expression for the end of a
layer's name, from a dot on -> its rank, or its alpha. The file has the further fields only where they say something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from paddlenlp.peft import LoRAConfig

from finetune.adapters.initial_weights import CHANGING
from finetune.adapters.scaling import ScalingRule
from finetune.adapters.update_tensors import LOKR, LORA, VERA

BIAS_ENDING = r"\.bias"
"""Ends the patterns of biases that are trained beside the updates."""
_OF_KIND: dict[str, set[str]] = {
    LORA: set(),
    VERA: {"vera", "projection_prng_key", "d_initial", "save_projection"},
    LOKR: {"lokr", "lokr_factor", "decompose_both"},
}
"""Kind of the update -> fields that are written for it alone."""


@dataclass
class LayeredLoRAConfig(LoRAConfig):  # type: ignore[misc]
    """One adapter.

    Attributes:
        rank_pattern: See the module's description.
        alpha_pattern: The same.
        use_dora: Whether every column of the updated weight has a trained length (`dora.py`).
        lora_bias: "all": all biases of the model are trained, "lora_only": those of adapted layers, "none".
        init_lora_weights: What A and B start from (`initial_weights.py`).
        vera: Whether A and B are frozen and shared, and two vectors of each layer are trained (`vera.py`).
        projection_prng_key: What VeRA's A and B are made from.
        d_initial: What VeRA's vectors of the rank start from.
        save_projection: Whether VeRA's A and B are written beside the adapter.
        lokr: Whether the update is a Kronecker product (`lokr.py`).
        lokr_factor: How LoKr divides the sizes of a layer (`kronecker.factor_pair`).
        decompose_both: Whether both matrices of LoKr may be products.
    """

    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: str = "none"
    init_lora_weights: str = "default"
    vera: bool = False
    projection_prng_key: int = 0
    d_initial: float = 0.1
    save_projection: bool = False
    lokr: bool = False
    lokr_factor: int = -1
    decompose_both: bool = False

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """What is written: PaddleNLP's fields, and those beyond them that say something."""
        known = set(_paddlenlp_fields())
        spoken, of_kinds = known | _OF_KIND[self.kind], set.union(*_OF_KIND.values())
        silent = (False, "none", "default")
        return {
            name: value
            for name, value in asdict(self).items()
            if name in spoken or (name not in of_kinds and value and value not in silent)
        }

    def to_dict(self) -> dict[str, Any]:
        """PaddleNLP's fields, from which it makes a configuration of its own."""
        return {name: getattr(self, name) for name in _paddlenlp_fields()}

    @property
    def rule(self) -> ScalingRule:
        """Rank and factor of every layer."""
        return ScalingRule(
            self.r,
            self.lora_alpha,
            self.rslora,
            self.pissa,
            dora=self.use_dora,
            kind=self.kind,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
        )

    @property
    def kind(self) -> str:
        """Which matrices make the update (`update_tensors.py`)."""
        return VERA if self.vera else LOKR if self.lokr else LORA

    @property
    def saved_patterns(self) -> set[str]:
        """Patterns of what is trained whole, without those of biases."""
        return {each for each in self.trainable_modules or () if not each.endswith(BIAS_ENDING)}

    @property
    def start(self) -> str:
        """What A and B start from; PaddleNLP has a field of its own for one kind."""
        if self.init_lora_weights.startswith("pissa_niter_"):
            return self.init_lora_weights
        return "pissa" if self.pissa else self.init_lora_weights

    @property
    def changes_base(self) -> bool:
        """Whether what A and B start from leaves the weights of the base."""
        return self.start.startswith(CHANGING)

    def of_layer(self, name: str) -> LayeredLoRAConfig:
        """The configuration of one layer, by PaddleNLP's name; how it starts is not left to PaddleNLP."""
        rule = self.rule
        own: dict[str, Any] = {"r": rule.rank_of(name), "lora_alpha": rule.alpha_of(name), "pissa": False}
        if self.kind != LORA:  # PaddleNLP's matrices do not stay
            own["r"] = 1
        return replace(self, **own)


def _paddlenlp_fields() -> list[str]:
    return [each.name for each in fields(LoRAConfig)]


def kind_fields(settings: Any) -> dict[str, Any]:
    """Rank and alpha of the update that the model arguments ask for, and what else its kind has."""
    if settings.vera:
        own = {"r": settings.vera_rank, "lora_alpha": float(settings.vera_rank)}  # a factor of 1
        return own | {name: getattr(settings, name) for name in _OF_KIND[VERA]}
    if settings.lokr:
        alpha = float(settings.lokr_dim) if settings.lokr_alpha is None else settings.lokr_alpha
        own = {"r": settings.lokr_dim, "lora_alpha": alpha}
        return own | {name: getattr(settings, name) for name in _OF_KIND[LOKR]}
    return {"r": settings.lora_rank, "lora_alpha": settings.lora_alpha}
