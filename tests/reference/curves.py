"""The runs whose curves are compared with Hugging Face transformers and peft, and what they share.

Every case is one run of finetune_generation.py from the same random weights on the same data;
the reference trains a transformers model, with weights copied over, on the same batches.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.families.cases import FACTS

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden_curves.json"
NUM_STEPS = 20
LORA_RANK = 4
SHAPE = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 600,
    "max_length": 256,
    "seed": 3,
}
_GROUPED = {"intermediate_size": 80, "num_key_value_heads": 2}
WHOLE_HEADS = {"intermediate_size": 80}
"""Each query head has its own keys: Falcon's tiny model is then of the form of RW 1B."""
FAMILY_SHAPES: dict[str, dict[str, int]] = {
    name: _GROUPED if facts.groups_heads else WHOLE_HEADS
    for name, facts in FACTS.items()
    if facts.named_as_llama
} | {
    "mixtral": _GROUPED,
    "glm4": _GROUPED,
    "phi3": _GROUPED,
    "internlm": WHOLE_HEADS,
    "internlm2": _GROUPED,
    "baichuan": WHOLE_HEADS,
    "baichuan2": WHOLE_HEADS,
    "bloom": {},
    "gpt2": WHOLE_HEADS,
    "falcon": _GROUPED,
    "opt": WHOLE_HEADS,
    "gemma2": _GROUPED,
    "gemma3": _GROUPED,
}
"""What each compared family adds to `SHAPE`."""


@dataclass(frozen=True)
class Case:
    """One compared run.

    Attributes:
        name: Of its curve.
        arguments: What its argument file adds to `COMMON`.
        family: Of the model.
        shape: What it adds to `SHAPE`; None: what the family adds.
        frozen: Pattern of transformers' names of what is not trained.
        frozen_share: Share of the parameters, in transformers' order, that is not trained at most.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    shape: dict[str, int] | None = None
    frozen: str = ""
    frozen_share: float = 0.0

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
_SFT = {"learning_rate": 2e-3, "lr_scheduler_type": "linear"}
# Larger steps bring training to the edge of stability, where rounding errors double at every step: two
# of our own runs with different matrix kernels then differ by more than the tolerance.
_LORA = {"learning_rate": 1e-2, "lora": True, "lora_rank": LORA_RANK}
BALANCED = {"router_aux_loss_coef": 0.5}
"""Far more than published models have: what it adds must be seen in loss and norm."""
CASES = {
    case.name: case
    for case in (
        Case("sft", _SFT),
        Case("sft_accumulate", {
            "learning_rate": 2e-3, "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
        }),
        Case("lora", _LORA),
        Case("rslora", _LORA | {"rslora": True}),
        *(Case(f"{family}_sft", _SFT, family) for family in list(FAMILY_SHAPES)[1:]),
        *(
            Case(f"{family}_lora", _LORA | {"learning_rate": facts.curve_learning_rate}, family)
            for family, facts in FACTS.items()
            if facts.curve_learning_rate
        ),
        # transformers 4.55 computes it for Qwen2-MoE on GPUs alone.
        *(Case(f"{family}_balanced", _SFT | BALANCED, family) for family in ("qwen3_moe", "mixtral")),
        Case("qwen3_moe_lora_balanced", _LORA | BALANCED | {"learning_rate": 1e-3}, "qwen3_moe"),
        Case("frozen_layers", _SFT | {"freeze_layers": 1}, frozen=r"model\.layers\.0\."),
        Case("frozen_share", _SFT | {"freeze_parameters_ratio": 0.6}, frozen_share=0.6),
        Case("trained_part", _SFT | {"freeze_parameters_ratio": 1, "trainable_parameters": ["lm_head", r"layers\.0\..*(up|v)_proj"]},
             frozen=r"(?!lm_head|.*layers\.0\..*(up|v)_proj)"),
        Case("gemma_frozen_embedding", _SFT | {"freeze_parameters": ["lm_head", "norm"]}, "gemma", frozen="model.embed_tokens|model.norm"),
        Case("bloom_trained_part", _SFT | {"trainable_parameters": ["word_embeddings", "h.1", "ln_f"]}, "bloom",
             frozen=r"(?!.*word_embeddings\.|.*h\.1\.|.*ln_f)"),
        Case("falcon_rw_sft", _SFT, "falcon", WHOLE_HEADS),
        Case("falcon_rw_lora", _LORA | {"learning_rate": 1e-3}, "falcon", WHOLE_HEADS),
        Case("opt_frozen_share", _SFT | {"freeze_parameters_ratio": 0.55}, "opt", frozen_share=0.55),
    )
}  # fmt: skip


def build_model(folder: Path, family: str = "llama", shape: dict[str, int] | None = None) -> Path:
    """The tiny model that cases of a family start from; `shape` in the place of what the family adds."""
    from finetune.models.tiny.checkpoint import build_tiny

    corpus = HERE / "data" / "train.json"
    return build_tiny(
        family, folder, corpus=corpus, **SHAPE | (FAMILY_SHAPES[family] if shape is None else shape)
    )


def build_adapter(folder: Path, model: Path, *, family: str = "llama", rslora: bool = False) -> Path:
    """A LoRA adapter with random A and small random B on the family's linear layers, in PaddleNLP's files."""
    from finetune.families.family import get_family
    from finetune.storage.checkpoints import Checkpoint

    targets = get_family(family).lora_target_modules
    random = np.random.default_rng(5)
    folder.mkdir(parents=True)
    tensors = {}
    for name, shape in sorted(Checkpoint(model).names.items()):
        layer = name.removesuffix(".weight")
        if len(shape) == 2 and any(re.fullmatch(target, layer) for target in targets):
            prefix = f"{layer}."
            tensors[prefix + "lora_A"] = random.normal(0, 0.3, (shape[0], LORA_RANK)).astype(np.float32)
            tensors[prefix + "lora_B"] = random.normal(0, 0.1, (LORA_RANK, shape[1])).astype(np.float32)
    save_file(tensors, folder / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (folder / "peft_model.safetensors.index.json").write_text(json.dumps(index))
    config = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "rslora": rslora, "dtype": "float32",
              "target_modules": list(targets), "lora_dropout": 0.0}  # fmt: skip
    (folder / "lora_config.json").write_text(json.dumps(config))
    return folder
