"""The runs in half precision that are compared with PyTorch's, and what they share.

O2 keeps weights in half precision and float32 master weights in the optimizer; O1 keeps float32 weights and computes
matrix products in half precision. PyTorch has kernels for both types on CPU; here operations round as a GPU's do
(finetune/machine/half_precision).
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.reference.curves import CASES, HERE, Case

GOLDEN = HERE / "golden_half_curves.json"
LOSS_SCALE = 1024.0
"""Of float16 runs: large enough to matter, a power of two, and too small to overflow here."""


@dataclass(frozen=True)
class HalfCase:
    """One compared run.

    Attributes:
        case: The float32 run that it is a variation of.
        dtype: "bfloat16" or "float16".
        level: "O1" or "O2".
    """

    case: Case
    dtype: str
    level: str

    @property
    def name(self) -> str:
        return f"{self.case.name}_{self.dtype}_{self.level}"

    def arguments(self) -> dict[str, object]:
        """What its argument file adds to that of the float32 run."""
        return {
            "rehearse_half_precision": True,
            "bf16": self.dtype == "bfloat16",
            "fp16": self.dtype == "float16",
            "fp16_opt_level": self.level,
            "scale_loss": LOSS_SCALE,
        }


# At the rate of the float32 comparison LoRA reaches the edge of stability, where roundings grow with every step.
_COMPARED = (CASES["sft"], Case("lora", CASES["lora"].arguments | {"learning_rate": 1e-3}))
HALF_CASES = {
    half.name: half
    for half in (
        HalfCase(case, dtype, level)
        for case in _COMPARED
        for dtype in ("bfloat16", "float16")
        for level in ("O1", "O2")
    )
}
