"""Measures how far transformers' mixtures of experts in bfloat16 come from their own float32, on CPU.

    python -m tests.reference.transformers_expert_rounding      # rewrites golden_expert_rounding.json

Model, data and settings are those of the precision matrix (`tests.distributed.precisions`). Tensor parallelism is
stood in for by products in two parts, each rounded, and their rounded sum. transformers balances each micro-batch alone,
in float32 as well; both have the same micro-batches.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

from finetune.data.samples.dataset import load_samples
from finetune.data.templates.template import load_template
from finetune.families.family import get_family
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.loading import load_tokenizer
from tests.distributed.layouts import COMMON, GLOBAL_BATCH_SIZE, ONE, build_data, build_model
from tests.distributed.precisions import LEARNING_RATES, NUM_DEV, NUM_STEPS, NUM_TRAIN
from tests.reference.expert_rounding import FAMILIES, FORMS, GOLDEN, SEEDS
from tests.reference.transformers_training import IGNORED, batches, load_reference_model

SETTINGS = {"per_device_train_batch_size": GLOBAL_BATCH_SIZE}
WARMUP, MAX_NORM, DECAY = 2, 0.5, 0.1
ROW_PARALLEL = ("o_proj", "down_proj", "w2")


class _InParts(torch.nn.Module):
    """A linear layer whose input is divided over two ranks."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half, weight = x.shape[-1] // 2, self.layer.weight  # [out, in]
        first = torch.nn.functional.linear(x[..., :half], weight[:, :half])
        return first + torch.nn.functional.linear(x[..., half:], weight[:, half:])


def divide(model: Any) -> None:
    """Computes row-parallel layers as two tensor-parallel ranks do."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in ROW_PARALLEL:
                setattr(parent, name, _InParts(layer))


def learn(model: Any, batch: dict[str, torch.Tensor], balance: float) -> float:
    """Adds the gradients of a step; its loss."""
    total, num_rows = 0.0, len(batch["labels"])
    num_labels = (batch["labels"] != IGNORED).sum()
    asked = {"output_router_logits": True} if balance else {}
    for part in _micro_batches(batch, ONE.micro_batch_size):
        outputs = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"], **asked)
        loss = torch.nn.functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),
            part["labels"].flatten(),
            reduction="sum",
            ignore_index=IGNORED,
        )
        loss = loss / num_labels
        if balance:
            loss = loss + balance * outputs.aux_loss * (len(part["labels"]) / num_rows)
        loss.backward()
        total += loss.item()
    return total


def _micro_batches(batch: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(batch["labels"]), size):
        yield {name: rows[start : start + size] for name, rows in batch.items()}


def losses(
    folder: Path,
    family: str,
    samples: list,
    seed: int,
    *,
    half: bool = False,
    num_parts: int = 1,
) -> torch.Tensor:
    """Loss of every step, float64 [steps]; in half precision weights and gradients are bfloat16, masters float32."""
    model = load_reference_model(folder, family).train()
    if half:
        model.to(torch.bfloat16)
    if num_parts > 1:
        divide(model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    balance = config["router_aux_loss_coef"] if config.get("output_router_logits") else 0.0
    trained = list(model.parameters())
    masters = [each.detach().float().clone() for each in trained]
    groups = [
        {"params": [each for each in masters if (each.ndim > 1) == on], "weight_decay": decay}
        for on, decay in ((True, DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATES["sft"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / WARMUP if step < WARMUP else (NUM_STEPS - step) / (NUM_STEPS - WARMUP)
    )
    found = []
    for batch in islice(batches(samples, SETTINGS | {"seed": seed}), NUM_STEPS):
        found.append(learn(model, batch, balance))
        for master, each in zip(masters, trained, strict=True):
            master.grad = torch.zeros_like(master) if each.grad is None else each.grad.float()
            each.grad = None
        torch.nn.utils.clip_grad_norm_(masters, MAX_NORM)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for master, each in zip(masters, trained, strict=True):
                each.copy_(master)
    return torch.tensor(found, dtype=torch.float64)


def measure(place: Path, family: str) -> dict[str, dict[str, float]]:
    """By seed and form the largest relative distance of a step's loss from float32."""
    folder = build_model(family, place / family, num_layers=2)
    encoder = FamilyEncoder(load_tokenizer(folder), get_family(family))
    lengths = {name: COMMON[name] for name in ("src_length", "max_length")}
    samples = load_samples([place / "data" / "train.json"], encoder, load_template(None), **lengths)[0]
    return {str(seed): distances_of(folder, family, samples, seed) for seed in SEEDS}


def distances_of(folder: Path, family: str, samples: list, seed: int) -> dict[str, float]:
    """Of one order of samples, how far each form in half precision is from float32."""
    exact = losses(folder, family, samples, seed)
    found = {}
    for form, num_parts in FORMS.items():
        rounded = losses(folder, family, samples, seed, half=True, num_parts=num_parts)
        found[form] = float(f"{((rounded - exact) / exact).abs().max():.2e}")
    return found


def main() -> int:
    """Writes the distances from which the bounds are made."""
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as name:
        build_data(Path(name) / "data", NUM_TRAIN, NUM_DEV)
        distances = {family: measure(Path(name), family) for family in FAMILIES}
    GOLDEN.write_text(json.dumps({"made_with": made_with, "distances": distances}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
