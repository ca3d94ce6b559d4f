"""Writes folders with bitsandbytes by way of transformers, and trains LoRA over them with peft, in float32 on CPU.

    python -m tests.reference.bitsandbytes_folders      # rewrites golden_stored.json

It needs torch, transformers, peft and bitsandbytes beside this project's packages (requirements/parity.txt).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers

from tests.reference.curves import build_adapter
from tests.reference.quantised_cases import ARGUMENTS, build_base
from tests.reference.stored_cases import GOLDEN_STORED, STORED, describe, facts_of, write_plain
from tests.reference.transformers_training import add_reference_lora, read_samples, train_reference


def write_folder(base: Path, folder: Path, name: str) -> Path:
    """Quantises the tiny Llama on loading, and saves it."""
    dtype = STORED[name][0]
    plain = write_plain(base, folder.parent / f"{name}-plain", dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain,
        torch_dtype=getattr(torch, dtype),
        quantization_config=transformers.BitsAndBytesConfig(**facts_of(name)),
        device_map="cpu",
    )
    model.save_pretrained(folder)
    for path in plain.iterdir():  # tokenizer
        if not (folder / path.name).exists() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def train_folder(folder: Path, adapter: Path, samples: list) -> list[dict[str, float]]:
    """The curve of LoRA over a folder that bitsandbytes wrote; what is not packed in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return train_reference(add_reference_lora(model, adapter), samples, ARGUMENTS)


def reference_folders(root: Path) -> dict[str, dict[str, Any]]:
    """Tensors and curve of every case; the folders stay in `root` under their names."""
    torch.manual_seed(0)
    base = build_base(root / "llama")
    adapter, samples = build_adapter(root / "adapter", base), read_samples(base)
    found = {}
    for name in STORED:
        folder = write_folder(base, root / name, name)
        found[name] = {"tensors": describe(folder), "curve": train_folder(folder, adapter, samples)}
    return found


def main() -> int:
    """Writes the golden values that are compared with where bitsandbytes is not installed."""
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__,
                 "bitsandbytes": bitsandbytes.__version__}  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        golden = {"made_with": made_with, "folders": reference_folders(Path(root))}
    GOLDEN_STORED.write_text(json.dumps(golden, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
