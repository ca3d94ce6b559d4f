"""Runs of LoRA's relatives whose curves are compared with peft's, from the same start on the same batches.

    python -m tests.reference.lora_relatives      # rewrites golden_lora_relatives.json, with torch and peft

What a relative starts from is peft's own rule wherever it is not drawn at random; random matrices are those of
`build_adapter`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune.adapters.kronecker import kronecker_shapes
from tests.reference.curves import COMMON, HERE, LORA_RANK, build_adapter, build_model

GOLDEN_RELATIVES = HERE / "golden_lora_relatives.json"
_RATES: dict[str, Any] = {
    "learning_rate": 1e-2,
    "lora": True,
    "lora_rank": LORA_RANK,
    "lora_alpha": 2 * LORA_RANK,
}
RELATIVES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True}, {"use_dora": True}),
    "qwen2_dora_bias": (
        "qwen2",
        {"use_dora": True, "lora_bias": "all"},
        {"use_dora": True, "bias": "all"},
    ),
    "bias_of_layers": ("qwen2", {"lora_bias": "lora_only"}, {"bias": "lora_only"}),
    "pissa": ("llama", {"pissa": True, "lora_alpha": LORA_RANK}, {"init_lora_weights": "pissa", "lora_alpha": LORA_RANK}),
    "olora": ("llama", {"init_lora_weights": "olora"}, {"init_lora_weights": "olora"}),
    "vera": ("llama", {"vera": True, "vera_rank": 16, "projection_prng_key": 7}, {"r": 16, "projection_prng_key": 7}),
    "lokr": ("llama", {"lokr": True, "lokr_dim": 2, "lokr_alpha": 6.0}, {"r": 2, "alpha": 6.0}),
    "qwen2_lokr": (
        "qwen2",
        {"lokr": True, "lokr_dim": 2, "lokr_alpha": 8.0, "lokr_factor": 8, "decompose_both": True},
        {"r": 2, "alpha": 8, "decompose_factor": 8, "decompose_both": True},
    ),
    "bloom_vera": ("bloom", {"vera": True, "vera_rank": 24}, {"r": 24}),
}  # fmt: skip
"""Name -> family, our settings, peft's."""
STARTS_FROM_BASE = ("pissa", "olora")


def settings_of(name: str) -> dict[str, Any]:
    """Everything of the argument file but the paths."""
    return COMMON | _RATES | RELATIVES[name][1]


def kind_of(name: str) -> str:
    """Which matrices a relative has."""
    return next((kind for kind in ("vera", "lokr") if RELATIVES[name][1].get(kind)), "lora")


def _tensor_shapes(ours: dict[str, Any], num_in: int, num_out: int) -> dict[str, tuple[int, ...]]:
    """Name of each tensor of a layer's update -> shape."""
    if ours.get("vera"):
        return {"vera_lambda_d": (ours["vera_rank"],), "vera_lambda_b": (num_out,)}
    shapes = kronecker_shapes(
        num_in, num_out, rank=ours["lokr_dim"], factor=ours.get("lokr_factor", -1),
        decompose_both=ours.get("decompose_both", False),
    )  # fmt: skip
    return {f"lokr_{end}": shape for end, shape in shapes.items()}


def _write_other_kind(folder: Path, model: Path, name: str) -> Path:
    """The same for a relative with other matrices than LoRA's, all of them random."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from finetune.adapters.lora_config import LayeredLoRAConfig
    from finetune.storage.checkpoints import Checkpoint

    family, ours, _ = RELATIVES[name]
    build_adapter(folder, model, family=family)
    random, base, tensors = np.random.default_rng(6), Checkpoint(model), {}
    for key in load_file(folder / "weights.safetensors"):
        layer, _, end = key.rpartition(".")
        if end == "lora_A":
            shapes = _tensor_shapes(ours, *base.names[f"{layer}.weight"])
            tensors |= {f"{layer}.{part}": random.normal(0, 0.3, shape) for part, shape in shapes.items()}
    config = json.loads((folder / "lora_config.json").read_text())
    more = {"r": ours.get("vera_rank") or ours["lokr_dim"], "lora_alpha": ours.get("lokr_alpha", 1)}
    own = {each: ours[each] for each in ours if each in LayeredLoRAConfig.__dataclass_fields__}
    (folder / "lora_config.json").write_text(json.dumps(config | more | own))
    save_file({key: each.astype(np.float32) for key, each in tensors.items()}, folder / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (folder / "peft_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_start(folder: Path, model: Path, name: str) -> Path:
    """An adapter folder that a relative starts from: random A and B, and lengths of columns as peft begins them."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from finetune.storage.checkpoints import Checkpoint

    if kind_of(name) != "lora":
        return _write_other_kind(folder, model, name)
    family, ours, _ = RELATIVES[name]
    build_adapter(folder, model, family=family)
    tensors, base = load_file(folder / "weights.safetensors"), Checkpoint(model)
    if ours.get("use_dora"):
        for layer in [each.removesuffix(".lora_A") for each in tensors if each.endswith(".lora_A")]:
            update = 2 * tensors[f"{layer}.lora_A"] @ tensors[f"{layer}.lora_B"]
            weight = base.read(f"{layer}.weight") + update
            tensors[f"{layer}.lora_magnitude"] = np.linalg.norm(weight, axis=0).astype(np.float32)
    patterns = []
    if "lora_bias" in ours:
        config = json.loads((folder / "lora_config.json").read_text())
        ends = config["target_modules"] if ours["lora_bias"] == "lora_only" else [".*"]
        patterns = [rf"(?:{each})\.bias" for each in ends]
        tensors |= {each: base.read(each) for each in base.names if each.endswith(".bias")}
    save_file(tensors, folder / "weights.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (folder / "peft_model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "lora_config.json").read_text())
    more = {"use_dora": bool(ours.get("use_dora")), "trainable_modules": patterns or None}
    (folder / "lora_config.json").write_text(json.dumps(config | more))
    return folder


def reference_curves() -> dict[str, list[dict[str, float]]]:
    """peft's curves of all relatives."""
    import torch
    from peft import LoKrConfig, LoraConfig, VeraConfig, get_peft_model
    from safetensors.numpy import load_file

    from tests.reference.transformers_training import (
        REFERENCES,
        load_reference_model,
        read_samples,
        train_reference,
    )

    curves = {}
    with tempfile.TemporaryDirectory() as name:
        for relative, (family, _, theirs) in RELATIVES.items():
            torch.manual_seed(0)
            folder = Path(name) / family
            if not folder.exists():
                build_model(folder, family)
            base, targets = load_reference_model(folder, family), list(REFERENCES[family].lora_layers)
            kind = kind_of(relative)
            common = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK} if kind == "lora" else {}
            settings = {"lora": LoraConfig, "vera": VeraConfig, "lokr": LoKrConfig}[kind]
            model = get_peft_model(base, settings(**common | {"target_modules": targets} | theirs))
            if relative not in STARTS_FROM_BASE:
                start = load_file(
                    write_start(Path(name) / relative, folder, relative) / "weights.safetensors"
                )
                parameters = dict(model.named_parameters())
                for key, array in start.items():
                    layer, _, part = f"base_model.model.{REFERENCES[family].rename(key)}".rpartition(".")
                    if part in ("lora_A", "lora_B"):
                        parameters[f"{layer}.{part}.default.weight"].data = torch.from_numpy(array.T.copy())
                    elif kind != "lora":
                        parameters[f"{layer}.{part}.default"].data = torch.from_numpy(array)
                    elif part == "lora_magnitude":
                        parameters[f"{layer}.lora_magnitude_vector.default.weight"].data = torch.from_numpy(
                            array
                        )
            curves[relative] = train_reference(model, read_samples(folder, family), settings_of(relative))
    return curves


def main() -> int:
    """Writes the golden values that are compared with where peft is not installed."""
    import peft
    import torch

    made_with = {"torch": torch.__version__, "peft": peft.__version__}
    GOLDEN_RELATIVES.write_text(
        json.dumps({"made_with": made_with, "curves": reference_curves()}, indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
