"""How far mixtures of experts come from float32 by rounding: what is measured of transformers, and the bounds from it.

A router gives tokens that lie between two experts to one or the other by the last bit of its logits. In half precision
some tokens of every step so pass another expert than in float32, and losses and gradients move by more than rounding
alone moves them. By how much is a fact of the model, its data and what is trained, so transformers is measured with the
same models, data, methods and AdamW (`tests.reference.transformers_expert_rounding`), and its own distance is the bound
here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from tests.reference.curves import HERE

GOLDEN = HERE / "golden_expert_rounding.json"
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe")
SEEDS = tuple(range(40, 50))
"""Orders of the samples: which tokens lie between two experts hangs on them."""
FIGURES = ("loss", "eval_loss", "grad_norm")
"""Of every step, of every evaluation, and of every step before clipping."""
FORMS = {"one": 1, "tp2": 2}
"""In how many parts, each rounded, row-parallel products are computed."""


def expert_tolerances(family: str, method: str, general: Mapping[str, float]) -> dict[str, float]:
    """The bounds of a family and method in bfloat16 with bfloat16 weights.

    Args:
        family: Of the model; one without experts has the general bounds.
        method: sft, lora or pt.
        general: The bounds of families without experts, which are the least of any family.

    Returns:
        `float32`: transformers' own largest distance of a step's loss from float32, over orders of samples and forms.
        Each of `FIGURES`: twice its own largest distance, as of two runs in half precision each may be so far away, on
        either side.
    """
    if family not in FAMILIES:
        return dict(general)
    largest = largest_distances(family, method)
    measured = {"float32": largest["loss"]} | {name: 2 * largest[name] for name in FIGURES}
    return {name: max(limit, measured[name]) for name, limit in general.items()}


def largest_distances(family: str, method: str) -> dict[str, float]:
    """Of each of `FIGURES` transformers' largest distance from its own float32."""
    forms = [form for of_seed in _golden()["distances"][family][method].values() for form in of_seed.values()]
    return {name: max(form[name] for form in forms) for name in FIGURES}


@cache
def _golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))
