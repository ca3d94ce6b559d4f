"""How far mixtures of experts come from float32 by rounding: what is measured of transformers, and the bounds from it.

A router gives tokens that lie between two experts to one or the other by the last bit of its logits. In half precision
some tokens of every step so pass another expert than in float32, and the loss moves by more than rounding alone does.
By how much is a fact of the model and its data, so transformers is measured with the same model, data and AdamW
(`tests.reference.transformers_expert_rounding`), and its own distance is the bound here.
"""

from __future__ import annotations

import json
from functools import cache

from tests.reference.curves import HERE

GOLDEN = HERE / "golden_expert_rounding.json"
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe")
SEEDS = tuple(range(40, 50))
"""Orders of the samples: which tokens lie between two experts hangs on them."""
FORMS = {"one": 1, "tp2": 2}
"""In how many parts, each rounded, row-parallel products are computed."""


@cache
def expert_tolerances(family: str) -> dict[str, float]:
    """The bounds of a family with experts in bfloat16 with bfloat16 weights; {} for other families.

    Returns:
        `float32`: transformers' own largest distance of a step's loss from float32, over orders of samples and forms.
        `loss`: twice that, as of two runs in half precision each may be so far away, on either side.
    """
    if family not in FAMILIES:
        return {}
    distances = json.loads(GOLDEN.read_text(encoding="utf-8"))["distances"][family]
    largest = max(value for of_seed in distances.values() for value in of_seed.values())
    return {"float32": largest, "loss": 2 * largest}
