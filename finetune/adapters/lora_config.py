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
from finetune.adapters.update_tensors import LORA, VERA

BIAS_ENDING = r"\.bias"
"""Ends the patterns of biases that are trained beside the updates."""
_OF_VERA = {"vera", "projection_prng_key", "d_initial", "save_projection"}


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

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """What is written: PaddleNLP's fields, and those beyond them that say something."""
        known = set(_paddlenlp_fields())
        spoken = known | (_OF_VERA if self.vera else set())
        silent = (False, "none", "default")
        return {
            name: value
            for name, value in asdict(self).items()
            if name in spoken or (name not in _OF_VERA and value and value not in silent)
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
        return VERA if self.vera else LORA

    @property
    def saved_patterns(self) -> set[str]:
        """Patterns of what is trained whole, without those of biases."""
        return {each for each in self.trainable_modules or () if not each.endswith(BIAS_ENDING)}

    @property
    def start(self) -> str:
        """What A and B start from; PaddleNLP has a field of its own for one kind."""
        return "pissa" if self.pissa else self.init_lora_weights

    @property
    def changes_base(self) -> bool:
        """Whether what A and B start from leaves the weights of the base."""
        return self.start in CHANGING

    def of_layer(self, name: str) -> LayeredLoRAConfig:
        """The configuration of one layer, by PaddleNLP's name; how it starts is not left to PaddleNLP."""
        rule = self.rule
        own: dict[str, Any] = {"r": rule.rank_of(name), "lora_alpha": rule.alpha_of(name), "pissa": False}
        if self.kind != LORA:  # PaddleNLP's matrices do not stay
            own["r"] = 1
        return replace(self, **own)


def _paddlenlp_fields() -> list[str]:
    return [each.name for each in fields(LoRAConfig)]
