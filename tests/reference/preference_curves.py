"""The preference runs whose curves are compared with TRL's losses, and what they share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reference import chatglm2_qwen_curves, curves
from tests.reference.chatglm2_qwen_published import PUBLISHED
from tests.reference.curves import COMMON, HERE, LORA_RANK

GOLDEN_PREFERENCES = HERE / "golden_preferences.json"


@dataclass(frozen=True)
class PreferenceCase:
    """A loss, with what its argument file adds, and the family of the model."""

    name: str
    loss_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    full_learning_rate: float = 1e-3
    lora_learning_rate: float = 5e-3
    only_lora: bool = False
    family: str = "llama"

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
        *(
            PreferenceCase(f"sigmoid_{family}", "sigmoid", family=family)
            for family in ("chatglm2", "qwen", "bloom")
        ),
        # Larger steps come to the kink of its ReLU, where the order of a sum decides between two gradients.
        PreferenceCase("sigmoid_opt", "sigmoid", lora_learning_rate=1e-3, family="opt"),
    )
}


def build_policy(folder: Path, family: str = "llama") -> Path:
    """The tiny model that all cases of a family start from, and are held to."""
    return _parts(family).build_model(folder, family)


def build_policy_adapter(folder: Path, policy: Path, family: str) -> Path:
    """The adapter that its cases with LoRA start from."""
    return _parts(family).build_adapter(folder, policy, family=family)


def _parts(family: str) -> Any:
    return chatglm2_qwen_curves if family in PUBLISHED else curves
