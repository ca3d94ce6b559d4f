"""PaddleNLP's configuration of a LoRA adapter with what PaddleNLP does not have: it goes into the same file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from paddlenlp.peft import LoRAConfig

from finetune.adapters.initial_weights import CHANGING
from finetune.adapters.scaling import ScalingRule

BIAS_ENDING = r"\.bias"
"""Ends the patterns of biases that are trained beside the updates."""


@dataclass
class AdapterConfig(LoRAConfig):  # type: ignore[misc]
    """One adapter.

    Attributes:
        use_dora: Whether every column of the updated weight has a trained length (`dora.py`).
        rank_pattern: Pattern of layers -> their rank; others have `r`.
        alpha_pattern: The same for alpha.
        lora_bias: "all": all biases of the model are trained, "lora_only": those of adapted layers, "none".
        init_lora_weights: What A and B start from (`initial_weights.py`).
    """

    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_bias: str = "none"
    init_lora_weights: str = "default"

    @property
    def rule(self) -> ScalingRule:
        """Rank and factor of every layer."""
        return ScalingRule(
            int(self.r),
            float(self.lora_alpha),
            bool(self.rslora),
            bool(self.pissa),
            self.rank_pattern,
            self.alpha_pattern,
        )

    @property
    def saved_patterns(self) -> set[str]:
        """Patterns of what is trained whole, without those of biases."""
        return {each for each in self.trainable_modules or () if not each.endswith(BIAS_ENDING)}

    def to_dict(self) -> dict[str, Any]:
        """PaddleNLP's fields, from which it makes a configuration of its own; files hold all."""
        return {each.name: getattr(self, each.name) for each in fields(LoRAConfig)}

    @property
    def start(self) -> str:
        """What A and B start from; PaddleNLP has a field of its own for one kind."""
        return "pissa" if self.pissa else self.init_lora_weights

    @property
    def changes_base(self) -> bool:
        """Whether what A and B start from leaves the weights of the base."""
        return self.start in CHANGING

    def of_layer(self, name: str) -> AdapterConfig:
        """The same for one layer, whose rank and alpha stand in it; how it starts is not left to PaddleNLP."""
        rule = self.rule
        own: dict[str, Any] = {"r": rule.rank_of(name), "lora_alpha": rule.alpha_of(name), "pissa": False}
        return replace(self, **own)


def config_fields(content: dict[str, Any]) -> dict[str, Any]:
    """Those of a file's fields that an `AdapterConfig` has."""
    known = AdapterConfig()
    return {key: value for key, value in content.items() if hasattr(known, key)}
