"""Quantises matrices with bitsandbytes, and trains LoRA over quantised layers with peft, in float32 on CPU.

    python -m tests.reference.bitsandbytes_training      # rewrites golden_quantised.json

It needs torch, transformers, peft and bitsandbytes beside this project's packages (requirements/parity.txt).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch

from tests.reference.curves import build_adapter
from tests.reference.quantised_cases import (
    ARGUMENTS,
    CURVES,
    FOUR_BIT,
    GOLDEN_QUANTISED,
    MATRICES,
    build_base,
    digest,
    random_matrix,
)
from tests.reference.transformers_training import (
    add_reference_lora,
    load_reference_model,
    read_samples,
    train_reference,
)


def quantise_matrices() -> dict[str, dict[str, Any]]:
    """Hashes of codes, scales and values of every matrix, by "name kind block_size double"."""
    found = {}
    for name in MATRICES:
        matrix = torch.from_numpy(random_matrix(name))
        for kind, size, double in FOUR_BIT:
            codes, state = bnb.quantize_4bit(
                matrix, blocksize=size, quant_type=kind, compress_statistics=double
            )
            entry = {
                "codes": digest(codes.numpy().reshape(-1)),
                "scales": digest(state.absmax.numpy()),
                "values": digest(bnb.dequantize_4bit(codes, state).numpy()),
            }
            if double:
                entry["outer"] = digest(state.state2.absmax.numpy())
                entry["offset"] = float(state.offset)
            found[f"{name} {kind} {size} {double}"] = entry
        codes, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
        found[f"{name} int8"] = {"codes": digest(codes.numpy()), "scales": digest(scales.float().numpy())}
    return found


def quantise_layers(model: Any, algorithm: str, *, double: bool) -> None:
    """Puts bitsandbytes' layers in the place of all linear layers but the output layer."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _quantised(layer, algorithm, double=double))
    is_int8 = algorithm == "llm.int8"
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = is_int8, not is_int8  # what peft looks at


def _quantised(layer: Any, algorithm: str, *, double: bool) -> Any:
    width, height, data = layer.in_features, layer.out_features, layer.weight.data
    if algorithm == "llm.int8":
        made = bitsandbytes.nn.Linear8bitLt(width, height, bias=False, has_fp16_weights=False)
        made.weight = bitsandbytes.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False)
    else:
        made = bitsandbytes.nn.Linear4bit(width, height, bias=False, compute_dtype=torch.float32)
        made.weight = bitsandbytes.nn.Params4bit(
            data, requires_grad=False, quant_type=algorithm, compress_statistics=double, blocksize=64
        )
    return made.to("cpu")


def train_curves() -> dict[str, list[dict[str, float]]]:
    """Loss and gradient norm of every step of each kind."""
    torch.manual_seed(0)
    curves = {}
    with tempfile.TemporaryDirectory() as name:
        folder = build_base(Path(name) / "llama")
        adapter = build_adapter(Path(name) / "adapter", folder)
        for kind, settings in CURVES.items():
            model = load_reference_model(folder)
            quantise_layers(
                model,
                settings["weight_quantize_algo"],
                double=settings.get("weight_double_quant", False),
            )
            model = add_reference_lora(model, adapter)
            curves[kind] = train_reference(model, read_samples(folder), ARGUMENTS)
    return curves


def main() -> int:
    """Writes the golden values that are compared with where bitsandbytes is not installed."""
    made_with = {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__}
    golden = {"made_with": made_with, "matrices": quantise_matrices(), "curves": train_curves()}
    GOLDEN_QUANTISED.write_text(json.dumps(golden, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
