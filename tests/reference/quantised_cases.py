"""What is compared with bitsandbytes: matrices by the hashes of their bytes, and curves of LoRA over quantised bases.

A matrix has a number of columns that the blocks divide, or an odd number of elements: bitsandbytes 0.50.2 packs every
shape rightly, but on CPUs with AVX-512 it dequantises wrongly where blocks cross rows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference.curves import COMMON, HERE, LORA_RANK

GOLDEN_QUANTISED = HERE / "golden_quantised.json"
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 600, "max_length": 256, "seed": 3,
         "intermediate_size": 128, "num_key_value_heads": 2}  # fmt: skip
CURVES: dict[str, dict[str, Any]] = {
    "nf4": {"weight_quantize_algo": "nf4"},
    "nf4_double": {"weight_quantize_algo": "nf4", "weight_double_quant": True},
    "fp4": {"weight_quantize_algo": "fp4"},
    "int8": {"weight_quantize_algo": "llm.int8"},
}
ARGUMENTS = COMMON | {"learning_rate": 1e-2, "lora": True, "lora_rank": LORA_RANK}
MATRICES = {"million": (1024, 1024), "blocks across rows": (33, 101), "wide": (7, 2048)}
FOUR_BIT = [(kind, size, double) for kind in ("nf4", "fp4") for size in (64, 256) for double in (False, True)]


def build_base(folder: Path) -> Path:
    """The tiny Llama that the curves start from."""
    from finetune.models.tiny.checkpoint import build_tiny

    return build_tiny("llama", folder, corpus=HERE / "data" / "train.json", **SHAPE)


def random_matrix(name: str) -> NDArray[np.float32]:
    """[out, in], with a block of zeros, exact ties between values, and one outlier."""
    random = np.random.Generator(np.random.PCG64(7))
    matrix = (random.standard_normal(MATRICES[name]) * 0.02).astype(np.float32)
    matrix[3, :64] = 0
    matrix[4, 0], matrix[4, 1] = 1.0, 0.5 / 12
    matrix[5, 5] = 40.0
    return matrix


def digest(array: NDArray[Any]) -> str:
    """Of the array's bytes and type."""
    return hashlib.sha256(str(array.dtype).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
