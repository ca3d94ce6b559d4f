"""Measures how far transformers' mixtures of experts in bfloat16 come from their own float32, on CPU.

    python -m tests.reference.transformers_expert_rounding                 # rewrites golden_expert_rounding.json
    python -m tests.reference.transformers_expert_rounding mixtral pt      # one family and method of it

Model, data and settings are those of the precision matrix (`tests.distributed.precisions`), LoRA is peft's, and a prefix
is handed over as past keys and values. Tensor parallelism is stood in for by products in two parts, each rounded, and
their rounded sum. transformers balances each micro-batch alone, in float32 as well; both have the same micro-batches.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from finetune.data.samples.dataset import load_samples
from finetune.data.templates.template import load_template
from finetune.families.family import get_family
from finetune.machine.randomness.seeding import derive_seed
from finetune.storage.checkpoints import Checkpoint
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.loading import load_tokenizer
from tests.distributed.layouts import COMMON, GLOBAL_BATCH_SIZE, METHODS, ONE, build_data, build_model
from tests.distributed.precisions import LEARNING_RATES, NUM_DEV, NUM_STEPS, NUM_TRAIN, SAVED
from tests.reference.curves import LORA_RANK
from tests.reference.expert_rounding import FAMILIES, FIGURES, FORMS, GOLDEN, SEEDS
from tests.reference.transformers_training import (
    IGNORED,
    add_reference_lora,
    batches,
    join_samples,
    load_reference_model,
)

SETTINGS = {"per_device_train_batch_size": GLOBAL_BATCH_SIZE}
WARMUP, MAX_NORM, DECAY = 2, 0.5, 0.1
ROW_PARALLEL = ("o_proj", "down_proj", "w2")
assert METHODS["lora"]["lora_rank"] == LORA_RANK  # of peft's adapter

Batch = dict[str, torch.Tensor]
Figures = dict[str, torch.Tensor]


class _InParts(torch.nn.Module):
    """A linear layer, with or without LoRA, whose input is divided over two ranks."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self._product(x, self.layer.weight)
        if hasattr(self.layer, "lora_A"):
            low = self._product(x, self.layer.lora_A["default"].weight)
            output = output + self.layer.lora_B["default"](low) * self.layer.scaling["default"]
        return output

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2  # of the columns of a weight [out, in]
        first = torch.nn.functional.linear(x[..., :half], weight[:, :half])
        return first + torch.nn.functional.linear(x[..., half:], weight[:, half:])


def divide(model: Any) -> None:
    """Computes row-parallel layers as two tensor-parallel ranks do."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in ROW_PARALLEL:
                setattr(parent, name, _InParts(layer))


@dataclass
class Trained:
    """A model and what of it is trained.

    Attributes:
        model: A causal language model of transformers.
        balance: What the balancing loss is multiplied by; 0 for none.
        prefix: Keys and values of a prefix [prefix tokens, 2 * layers * kv heads * head dim], or None.
    """

    model: Any
    balance: float
    prefix: torch.nn.Parameter | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        if self.prefix is not None:
            return [self.prefix]
        return [each for each in self.model.parameters() if each.requires_grad]

    def round(self) -> None:
        """Makes everything bfloat16."""
        self.model.to(torch.bfloat16)
        if self.prefix is not None:
            self.prefix.data = self.prefix.data.to(torch.bfloat16)

    def label_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the cross-entropy over label tokens, and the balancing loss; both float32 scalars."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        asked: dict[str, Any] = {"output_router_logits": True} if self.balance else {}
        seen = mask
        if self.prefix is not None:
            asked["past_key_values"] = self._past(len(ids))
            seen = torch.cat([mask.new_ones(len(ids), len(self.prefix)), mask], dim=1)  # [batch, keys]
        places = torch.arange(ids.shape[1]).unsqueeze(0)  # of the tokens alone: a prefix takes no place
        outputs = self.model.model(ids, attention_mask=seen, position_ids=places, **asked)
        loss = torch.nn.functional.cross_entropy(
            self.model.lm_head(outputs.last_hidden_state).float().flatten(0, 1),
            batch["labels"].flatten(),
            reduction="sum",
            ignore_index=IGNORED,
        )
        return loss, self._balancing_loss(outputs.router_logits, mask) if self.balance else torch.zeros(())

    def _balancing_loss(self, logits: tuple[torch.Tensor, ...], mask: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        num_experts = getattr(config, "num_local_experts", None) or config.num_experts
        return load_balancing_loss_func(logits, num_experts, config.num_experts_per_tok, mask)

    def _past(self, batch_size: int) -> Any:
        """The prefix as keys and values [batch, kv heads, prefix, head dim] of every layer."""
        config, prefix = self.model.config, self.prefix
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        parts = prefix.reshape(len(prefix), 2, config.num_hidden_layers, config.num_key_value_heads, head_dim)
        keys, values = parts.permute(1, 2, 3, 0, 4).unsqueeze(2).expand(-1, -1, batch_size, -1, -1, -1)
        return transformers.DynamicCache.from_legacy_cache(tuple(zip(keys, values, strict=True)))


def build(folder: Path, family: str, method: str, seed: int) -> Trained:
    """A model in float32 and its trained parts, which start as this project's do."""
    model = load_reference_model(folder, family).train()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    balance = config["router_aux_loss_coef"] if config.get("output_router_logits") else 0.0
    if method == "lora":
        with tempfile.TemporaryDirectory() as place:
            write_adapter(Path(place), folder, family, seed)
            model = add_reference_lora(model, Path(place), family=family).get_base_model()
    if method != "pt":
        return Trained(model, balance)
    geometry = get_family(family).prefix_geometry(model.config)
    num_tokens = METHODS["pt"]["num_prefix_tokens"]
    shape = (num_tokens, geometry.num_layers * 2 * geometry.num_kv_heads * geometry.head_dim)
    values = draw(seed, "prefix", shape=shape, bound=math.sqrt(6 / sum(shape)))
    return Trained(model.requires_grad_(False), balance, torch.nn.Parameter(torch.from_numpy(values)))


def write_adapter(place: Path, folder: Path, family: str, seed: int) -> None:
    """The matrices of a new adapter: every A drawn by its layer's name, every B zero."""
    targets, tensors = get_family(family).lora_target_modules, {}
    for name, shape in sorted(Checkpoint(folder).names.items()):
        layer = name.removesuffix(".weight")
        if len(shape) == 2 and any(re.fullmatch(target, layer) for target in targets):
            bound = 1 / math.sqrt(shape[0])
            tensors[f"{layer}.lora_A"] = draw(seed, "lora", layer, shape=(shape[0], LORA_RANK), bound=bound)
            tensors[f"{layer}.lora_B"] = np.zeros((LORA_RANK, shape[1]), np.float32)
    save_file(tensors, place / "weights.safetensors")


def draw(seed: int, *key: str, shape: tuple[int, int], bound: float) -> np.ndarray:
    """Uniform values for one purpose, float32."""
    random = np.random.default_rng(derive_seed(seed, *key))
    return random.uniform(-bound, bound, shape).astype(np.float32)


def learn(trained: Trained, batch: Batch) -> float:
    """Adds the gradients of a step; its loss."""
    total, num_rows = 0.0, len(batch["labels"])
    num_labels = (batch["labels"] != IGNORED).sum()
    for part in micro_batches(batch, ONE.micro_batch_size):
        loss, spread = trained.label_loss(part)
        loss = loss / num_labels
        if trained.balance:
            loss = loss + trained.balance * spread * (len(part["labels"]) / num_rows)
        loss.backward()
        total += loss.item()
    return total


def evaluate(trained: Trained, batch: Batch) -> float:
    """The loss of all label tokens."""
    with torch.no_grad():
        parts = micro_batches(batch, COMMON["per_device_eval_batch_size"])
        total = sum(trained.label_loss(part)[0].double().item() for part in parts)
    return total / int((batch["labels"] != IGNORED).sum())


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Rows of a batch in parts."""
    for start in range(0, len(batch["labels"]), size):
        yield {name: rows[start : start + size] for name, rows in batch.items()}


def train(trained: Trained, method: str, train_batches: Iterator[Batch], dev: Batch) -> Figures:
    """What is compared, each float64 [steps or evaluations]; masters are float32 whatever is trained."""
    masters = [each.detach().float().clone() for each in trained.parameters]
    groups = [
        {"params": [each for each in masters if (each.ndim > 1) == on], "weight_decay": decay}
        for on, decay in ((True, DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATES[method])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / WARMUP if step < WARMUP else (NUM_STEPS - step) / (NUM_STEPS - WARMUP)
    )
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    for step, batch in enumerate(train_batches, start=1):
        found["loss"].append(learn(trained, batch))
        for master, each in zip(masters, trained.parameters, strict=True):
            master.grad = torch.zeros_like(master) if each.grad is None else each.grad.float()
            each.grad = None
        found["grad_norm"].append(torch.nn.utils.clip_grad_norm_(masters, MAX_NORM).item())
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for master, each in zip(masters, trained.parameters, strict=True):
                each.copy_(master)
        if step % SAVED == 0:
            found["eval_loss"].append(evaluate(trained, dev))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


class Measurement:
    """A family's model and samples.

    Args:
        place: A folder with `data` in it, to which the model is written.
        family: Of the model.
    """

    def __init__(self, place: Path, family: str):
        self.family = family
        self.folder = build_model(family, place / family, num_layers=2)
        encoder = FamilyEncoder(load_tokenizer(self.folder), get_family(family))
        lengths = {name: COMMON[name] for name in ("src_length", "max_length")}
        self.samples, dev = (
            load_samples([place / "data" / f"{split}.json"], encoder, load_template(None), **lengths)[0]
            for split in ("train", "dev")
        )
        self.dev = join_samples([dev[i] for i in range(len(dev))])

    def figures(self, method: str, seed: int, *, half: bool = False, num_parts: int = 1) -> Figures:
        """Those of one run; in half precision weights and gradients are bfloat16."""
        trained = build(self.folder, self.family, method, seed)
        if half:
            trained.round()
        if num_parts > 1:
            divide(trained.model)
        order = islice(batches(self.samples, SETTINGS | {"seed": seed}), NUM_STEPS)
        return train(trained, method, order, self.dev)

    def distances(self, method: str, seed: int) -> dict[str, dict[str, float]]:
        """By form and figure, how far a run in half precision is from float32 at most."""
        exact = self.figures(method, seed)
        found = {}
        for form, num_parts in FORMS.items():
            rounded = self.figures(method, seed, half=True, num_parts=num_parts)
            found[form] = {
                name: float(f"{((rounded[name] - exact[name]) / exact[name]).abs().max():.2e}")
                for name in exact
            }
        return found


def main() -> int:
    """Writes the distances from which the bounds are made."""
    parser = argparse.ArgumentParser(description="Write golden_expert_rounding.json.")
    parser.add_argument("family", nargs="?", choices=FAMILIES)
    parser.add_argument("method", nargs="?", choices=METHODS)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order on every machine
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    golden["made_with"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as name:
        build_data(Path(name) / "data", NUM_TRAIN, NUM_DEV)
        for family in [asked.family] if asked.family else FAMILIES:
            measurement = Measurement(Path(name), family)
            for method in [asked.method] if asked.method else METHODS:
                of_method = golden["distances"].setdefault(family, {})
                of_method[method] = {str(seed): measurement.distances(method, seed) for seed in SEEDS}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
