"""The reward models whose curves are compared with TRL's, and what they share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from finetune.machine.randomness.seeding import derive_seed
from tests.reference.curves import COMMON, HERE, LORA_RANK, build_adapter

GOLDEN_REWARDS = HERE / "golden_rewards.json"
HEAD = "score.weight"


@dataclass(frozen=True)
class RewardCase:
    """A reward model.

    Attributes:
        name: Of its curve.
        has_margins: Whether its pairs have margins.
        settings: What its argument file adds.
    """

    name: str
    has_margins: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def arguments(self, *, lora: bool) -> dict[str, Any]:
        """The argument file of the run, but for its folders; a global batch of 8."""
        method = {"lora": True, "lora_rank": LORA_RANK, "learning_rate": 2e-3}
        batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 11}
        common = {**COMMON, "loss_type": "reward", "data_cache": False}
        return common | batch | self.settings | (method if lora else {"learning_rate": 1e-3})

    def write_data(self, folder: Path) -> Path:
        """The pairs of the other methods, here with margins of which some are negative, some absent."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = (HERE / "data" / "pairs" / "train.json").read_text(encoding="utf-8").splitlines()
        with open(folder / "train.json", "w", encoding="utf-8") as file:
            for number, line in enumerate(lines):
                margin = {"margin": 0.4 * (number % 5) - 0.5} if self.has_margins and number % 3 else {}
                file.write(json.dumps(json.loads(line) | margin, ensure_ascii=False) + "\n")
        return folder


CASES = {
    case.name: case
    for case in (
        RewardCase("reward"),
        RewardCase("reward_margins", has_margins=True),
        RewardCase("reward_centred", has_margins=True, settings={"center_rewards_coefficient": 0.05}),
    )
}


def draw_head(width: int, seed: int) -> np.ndarray:
    """The head that a run starts from, float32 [width, 1]."""
    random = np.random.default_rng(derive_seed(seed, "reward head"))
    return random.normal(0, 0.02, (width, 1)).astype(np.float32)


def build_reward_adapter(folder: Path, model: Path) -> Path:
    """The adapter of the other comparisons with a head in it, saved whole."""
    build_adapter(folder, model)
    head = draw_head(32, 3)
    tensors = load_file(folder / "weights.safetensors") | {HEAD: head}
    save_file(tensors, folder / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (folder / "peft_model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "lora_config.json").read_text())
    config["trainable_modules"] = [r"(.*\.)?score\.[^.]+"]
    (folder / "lora_config.json").write_text(json.dumps(config))
    return folder
