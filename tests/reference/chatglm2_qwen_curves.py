"""The runs of chatglm2 and qwen whose curves are compared with the reference models.

As for Llama: one run of finetune_generation.py per case; the reference trains its own model, from the
same weights on the same batches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.reference.chatglm2_qwen_published import PUBLISHED
from tests.reference.curves import HERE, LORA_RANK

GOLDEN = HERE / "chatglm2_qwen_golden.json"
SHAPE = {"hidden_size": 32, "intermediate_size": 80, "num_layers": 2, "num_heads": 4, "vocab_size": 600,
         "max_length": 256, "seed": 3}  # fmt: skip
WEIGHT_SCALE = 5.0
"""The tiny weights are multiplied by this. As they are, attention is uniform, some gradients are mere
rounding, and Adam makes full steps of them: two right runs would part after ten steps."""

OPTIONS: dict[str, dict[str, Any]] = {
    "chatglm": {},
    "chatglm2": {"num_key_value_heads": 2},
    "chatglm3": {"num_key_value_heads": 2},
    "chatglm4": {"num_key_value_heads": 2},
    "qwen": {},
}


@dataclass(frozen=True)
class Case:
    """One compared run: a family and what its argument file adds to the common settings."""

    family: str
    method: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def lora(self) -> bool:
        return self.method == "lora"


METHODS = {
    "sft": {"learning_rate": 2e-3, "lr_scheduler_type": "linear"},
    "lora": {"learning_rate": 1e-2, "lora": True, "lora_rank": LORA_RANK},
}
CASES = {
    f"{family}_{method}": Case(family, method, arguments)
    for family in PUBLISHED
    for method, arguments in METHODS.items()
}


def build_model(folder: Path, family: str) -> Path:
    """The checkpoint that both cases of a family start from."""
    from finetune.models.tiny.checkpoint import build_tiny

    build_tiny(family, folder, corpus=HERE / "data" / "train.json", **SHAPE, **OPTIONS[family])
    path = folder / "model.safetensors"
    scaled = {
        name: array if "norm" in name or "ln_" in name else array * np.float32(WEIGHT_SCALE)
        for name, array in load_file(path).items()
    }
    save_file(scaled, path, metadata={"format": "np"})
    return folder


def build_adapter(folder: Path, model: Path, family: str) -> Path:
    """A LoRA adapter with random A and small random B on the family's linear layers, in PaddleNLP's files."""
    from finetune.storage.checkpoints import Checkpoint

    random = np.random.default_rng(5)
    folder.mkdir(parents=True)
    layers = PUBLISHED[family].lora_layers
    tensors = {}
    for name, shape in sorted(Checkpoint(model).names.items()):
        if name.removesuffix(".weight").endswith(layers) and len(shape) == 2:
            prefix = name.removesuffix("weight")
            tensors[prefix + "lora_A"] = random.normal(0, 0.3, (shape[0], LORA_RANK)).astype(np.float32)
            tensors[prefix + "lora_B"] = random.normal(0, 0.1, (LORA_RANK, shape[1])).astype(np.float32)
    save_file(tensors, folder / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (folder / "peft_model.safetensors.index.json").write_text(json.dumps(index))
    config = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "rslora": False, "dtype": "float32",
              "target_modules": [f".*{layer}" for layer in layers], "lora_dropout": 0.0}  # fmt: skip
    (folder / "lora_config.json").write_text(json.dumps(config))
    return folder
