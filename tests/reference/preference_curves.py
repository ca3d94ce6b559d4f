"""The preference runs whose curves are compared with TRL's losses, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reference.curves import COMMON, HERE, LORA_RANK

GOLDEN_PREFERENCES = HERE / "golden_preferences.json"
_SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 600, "max_length": 256, "seed": 3,
          "intermediate_size": 80, "num_key_value_heads": 2}  # fmt: skip


@dataclass(frozen=True)
class PreferenceCase:
    """A loss, with what its argument file adds."""

    name: str
    loss_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    full_learning_rate: float = 1e-3
    lora_learning_rate: float = 5e-3
    only_lora: bool = False

    @property
    def is_marked(self) -> bool:
        return self.loss_type == "kto"

    def arguments(self, *, lora: bool) -> dict[str, Any]:
        """The argument file of the run, but for its folders; a global batch of 8, all samples of the marked data."""
        method = {"lora": True, "lora_rank": LORA_RANK, "learning_rate": self.lora_learning_rate}
        full = {"learning_rate": self.full_learning_rate}
        batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 11}
        common = {**COMMON, "loss_type": self.loss_type, "beta": 0.2, "data_cache": False}
        return common | batch | self.settings | (method if lora else full)

    def data(self) -> Path:
        return HERE / "data" / ("marked" if self.is_marked else "pairs")


CASES = {
    case.name: case
    for case in (
        PreferenceCase("sigmoid", "sigmoid"),
        PreferenceCase("sigmoid_smoothed", "sigmoid", {"label_smoothing": 0.1}),
        PreferenceCase("sigmoid_supervised", "sigmoid", {"sft_loss_ratio": 0.5}),
        PreferenceCase("sigmoid_reference_free", "sigmoid", {"reference_free": True}),
        PreferenceCase("sigmoid_base", "sigmoid", {"reference_model": "base"}, only_lora=True),
        PreferenceCase("hinge", "hinge"),
        PreferenceCase("ipo", "ipo"),
        PreferenceCase("robust", "robust", {"label_smoothing": 0.2}),
        PreferenceCase("exo_pair", "exo_pair", {"label_smoothing": 0.1}),
        PreferenceCase("nca_pair", "nca_pair"),
        PreferenceCase(
            "sppo_hard", "sppo_hard", {"beta": 1.0}, full_learning_rate=2e-4, lora_learning_rate=1e-3
        ),
        PreferenceCase("apo_zero", "apo_zero"),
        PreferenceCase("apo_down", "apo_down"),
        PreferenceCase("orpo", "orpo"),
        PreferenceCase("simpo", "simpo", {"beta": 2.0, "simpo_gamma": 1.0}),
        PreferenceCase("cpo", "cpo"),
        PreferenceCase("kto", "kto", {"desirable_weight": 1.2, "undesirable_weight": 0.8}),
    )
}


def build_policy(folder: Path) -> Path:
    """The tiny Llama that all cases start from, and are held to."""
    from finetune.models.tiny.checkpoint import build_tiny

    return build_tiny("llama", folder, corpus=HERE / "data" / "train.json", **_SHAPE)
