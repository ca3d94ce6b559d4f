"""Trains the compared cases in half precision with PyTorch, transformers and peft on CPU.

    python -m tests.reference.transformers_half_training      # rewrites golden_half_curves.json

O2 is written out: weights rounded to half precision, gradients in half precision, and AdamW on float32 master weights
that are rounded back after each step. O1 is PyTorch's own autocast over float32 weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.reference.curves import COMMON, build_adapter, build_model
from tests.reference.half_curves import GOLDEN, HALF_CASES, LOSS_SCALE, HalfCase
from tests.reference.transformers_training import (
    add_reference_lora,
    batches,
    label_loss,
    learning_rate_factor,
    load_reference_model,
    read_samples,
)


def train_half(
    model: Any, samples: list, arguments: dict[str, Any], half: HalfCase
) -> list[dict[str, float]]:
    """Loss and gradient norm of every step."""
    dtype = getattr(torch, half.dtype)
    scale = LOSS_SCALE if half.dtype == "float16" else 1.0
    model.train()
    if half.level == "O2":
        model.to(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float().clone() for parameter in trained]
    groups = [
        {"params": [each for each in masters if (each.ndim > 1) == on], "weight_decay": decay}
        for on, decay in ((True, arguments["weight_decay"]), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments["learning_rate"], betas=(0.9, 0.999), eps=1e-8)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, arguments)
    )
    curve = []
    for batch in batches(samples, arguments):
        with torch.autocast("cpu", dtype=dtype, enabled=half.level == "O1"):
            loss = label_loss(model, batch)
        (loss * scale).backward()
        for master, parameter in zip(masters, trained, strict=True):
            master.grad = parameter.grad.float() / scale
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(masters, arguments["max_grad_norm"])
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for master, parameter in zip(masters, trained, strict=True):
                parameter.copy_(master)
        curve.append({"loss": loss.item(), "grad_norm": norm.item()})
    return curve


def half_curves() -> dict[str, list[dict[str, float]]]:
    """The curves of all cases."""
    curves = {}
    with tempfile.TemporaryDirectory() as name:
        folder = build_model(Path(name) / "model")
        samples = read_samples(folder)
        for half in HALF_CASES.values():
            model = load_reference_model(folder)
            model.set_attn_implementation("eager")
            if half.case.lora:
                adapter = build_adapter(Path(name) / half.name, folder)
                model = add_reference_lora(model, adapter)
            curves[half.name] = train_half(model, samples, COMMON | half.case.arguments, half)
    return curves


def main() -> int:
    """Writes the golden values that are compared with where PyTorch is not installed."""
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    GOLDEN.write_text(json.dumps({"made_with": made_with, "curves": half_curves()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
