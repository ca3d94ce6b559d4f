"""PaddleNLP's configuration of LoRA with ranks and alphas of single layers, as peft's has them.

`rank_pattern` and `alpha_pattern` of lora_config.json are peft's fields for PaddleNLP's names: a regular expression
for the end of a layer's name, from a dot on -> its rank, or its alpha. PaddleNLP does not know them, and the file has
them only where a layer differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from paddlenlp.peft import LoRAConfig

from finetune.adapters.scaling import ScalingRule

_PATTERNS = ("rank_pattern", "alpha_pattern")


@dataclass
class LayeredLoRAConfig(LoRAConfig):  # type: ignore[misc]
    """See the module's description."""

    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """What is written: PaddleNLP's fields, and those beyond them that say something."""
        return {name: value for name, value in asdict(self).items() if value or name not in _PATTERNS}

    def of_layer(self, name: str) -> LayeredLoRAConfig:
        """The configuration of one layer, by PaddleNLP's name."""
        rule = ScalingRule(
            self.r,
            self.lora_alpha,
            self.rslora,
            self.pissa,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
        )
        own: dict[str, Any] = {"r": rule.rank_of(name), "lora_alpha": rule.alpha_of(name)}
        return replace(self, **own)
