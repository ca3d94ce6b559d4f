"""What `quantization_config` says in folders of different origin."""

from __future__ import annotations

from typing import Any

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
PADDLE = {"weight_quantize_algo": "llm.int8"}
PADDLE_ONLY = {"weight_quantize_algo": "weight_only_int8"}


def compressed(bits: int, size: int = 128, form: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": bits, "type": "int", "strategy": "channel" if size == -1 else "group",
              "group_size": None if size == -1 else size, **weights}  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
