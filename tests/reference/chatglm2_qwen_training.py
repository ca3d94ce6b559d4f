"""Trains the reference models of chatglm2 and qwen on PyTorch tensors, in float32 on CPU.

    python -m tests.reference.chatglm2_qwen_training      # rewrites chatglm2_qwen_golden.json

The forward pass is that of the NumPy references; PyTorch gives gradients, AdamW and the schedule.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.numpy import load_file

from tests.reference.chatglm2_qwen_curves import CASES, GOLDEN, build_adapter, build_model
from tests.reference.chatglm2_qwen_published import (
    PUBLISHED,
    published_config,
    published_name,
    published_weights,
)
from tests.reference.curves import COMMON, HERE
from tests.reference.transformers_training import train_reference

LORA_SCALING = 2.0  # alpha / rank, as in the adapter's configuration


class ReferenceModel:
    """A reference forward pass with its trained tensors, in the shape that the training loop expects."""

    def __init__(self, folder: Path, family: str, adapter: Path | None = None):
        self.published = PUBLISHED[family]
        self.config = published_config(folder, family)
        self.weights = {
            name: torch.from_numpy(array.copy()) for name, array in published_weights(folder, family).items()
        }
        self.adapter: dict[str, torch.Tensor] = {}
        if adapter is not None:
            for name, array in load_file(adapter / "weights.safetensors").items():
                self.adapter[published_name(name, family)] = torch.from_numpy(array.copy())
        for tensor in (self.adapter or self.weights).values():
            tensor.requires_grad_(True)

    def train(self) -> None:
        """There is no dropout to switch on."""

    def eval(self) -> ReferenceModel:
        """The same."""
        return self

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What is trained."""
        yield from (self.adapter or self.weights).items()

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """Logits; the mask is not needed, because padding is on the right."""
        weights = dict(self.weights)
        for name, first in self.adapter.items():
            layer, _, part = name.rpartition(".")
            if part == "lora_A":
                update = first @ self.adapter[f"{layer}.lora_B"]
                weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + LORA_SCALING * update.T
        return SimpleNamespace(logits=self.published.logits(weights, input_ids.numpy(), self.config, torch))


def read_samples(folder: Path, family: str) -> list:
    """The samples as token ids, read by this project."""
    from finetune.data.samples.dataset import load_samples
    from finetune.data.templates.template import load_template
    from finetune.families.family import get_family
    from finetune.tokenizers.encoder import FamilyEncoder
    from finetune.tokenizers.loading import load_tokenizer

    record = get_family(family)
    encoder = FamilyEncoder(load_tokenizer(folder, record), record)
    lengths = {name: COMMON[name] for name in ("src_length", "max_length")}
    return load_samples([HERE / "data" / "train.json"], encoder, load_template(None), **lengths)[0]


def reference_curves() -> dict[str, list[dict[str, float]]]:
    """The curves of all cases."""
    curves = {}
    with tempfile.TemporaryDirectory() as name:
        folders: dict[str, Any] = {}
        for key, case in CASES.items():
            if case.family not in folders:
                folder = build_model(Path(name) / case.family, case.family)
                folders[case.family] = folder, read_samples(folder, case.family)
            folder, samples = folders[case.family]
            adapter = build_adapter(Path(name) / key, folder, case.family) if case.lora else None
            model = ReferenceModel(folder, case.family, adapter)
            curves[key] = train_reference(model, samples, COMMON | case.arguments)
    return curves


def main() -> int:
    """Writes the golden values that are compared with where PyTorch is not installed."""
    made_with = {"torch": torch.__version__}
    GOLDEN.write_text(json.dumps({"made_with": made_with, "curves": reference_curves()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
