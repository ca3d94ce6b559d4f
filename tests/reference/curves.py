"""The runs whose curves are compared with Hugging Face transformers and peft, and what they share.

Every case is one run of finetune_generation.py from the same random weights on the same data;
the reference trains a transformers model, with weights copied over, on the same batches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden_curves.json"
NUM_STEPS = 20
LORA_RANK = 4
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_layers": 2,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 600,
    "max_length": 256,
    "seed": 3,
}


@dataclass(frozen=True)
class Case:
    """One compared run: a name and what its argument file adds to `COMMON`."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def lora(self) -> bool:
        return bool(self.arguments.get("lora"))


COMMON = {
    "device": "cpu",
    "do_train": True,
    "max_steps": NUM_STEPS,
    "per_device_train_batch_size": 4,
    "warmup_steps": 3,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "src_length": 96,
    "max_length": 160,
    "seed": 11,
}
CASES = {
    case.name: case
    for case in (
        Case("sft", {"learning_rate": 2e-3, "lr_scheduler_type": "linear"}),
        Case("sft_accumulate", {
            "learning_rate": 2e-3, "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
        }),
        Case("lora", {"learning_rate": 3e-2, "lora": True, "lora_rank": LORA_RANK}),
        Case("rslora", {"learning_rate": 3e-2, "lora": True, "lora_rank": LORA_RANK, "rslora": True}),
    )
}  # fmt: skip


def build_model(folder: Path) -> Path:
    """The tiny Llama that all cases start from."""
    from finetune.models.tiny import build_tiny

    build_tiny("llama", folder, corpus=HERE / "data" / "train.json", **SHAPE)
    return folder


def build_adapter(folder: Path, model: Path, *, rslora: bool) -> Path:
    """A LoRA adapter with random A and small random B on all linear layers, in PaddleNLP's files."""
    from finetune.models.weights import Checkpoint

    random = np.random.default_rng(5)
    folder.mkdir(parents=True)
    tensors = {}
    for name, shape in sorted(Checkpoint(model).names.items()):
        if name.endswith("_proj.weight"):
            prefix = name.removesuffix("weight")
            tensors[prefix + "lora_A"] = random.normal(0, 0.3, (shape[0], LORA_RANK)).astype(np.float32)
            tensors[prefix + "lora_B"] = random.normal(0, 0.1, (LORA_RANK, shape[1])).astype(np.float32)
    save_file(tensors, folder / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (folder / "peft_model.safetensors.index.json").write_text(json.dumps(index))
    config = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "rslora": rslora, "dtype": "float32",
              "target_modules": [".*_proj"], "lora_dropout": 0.0}  # fmt: skip
    (folder / "lora_config.json").write_text(json.dumps(config))
    return folder
