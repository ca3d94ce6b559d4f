"""What the tests of all families share: one row per family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FamilyCase:
    """A family, options of its tiny checkpoint, and what must come out."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    num_kv_heads: int = 4
    prefix: tuple[str, ...] = ("<s>",)
    end_of_answer: str = "</s>"
    fused_layers: bool = False
    bfloat16_on_cpu: bool = True


CASES = (
    FamilyCase("llama", fused_layers=True),
    FamilyCase("llama", {"num_key_value_heads": 2}, num_kv_heads=2, fused_layers=True),
    FamilyCase(
        "chatglm2",
        {"num_key_value_heads": 2},
        num_kv_heads=2,
        prefix=("[gMASK]", "sop"),
        bfloat16_on_cpu=False,
    ),
    FamilyCase("qwen", {"vocab_size": 520}, prefix=(), end_of_answer="<|endoftext|>"),
    FamilyCase(
        "qwen2",
        {"num_key_value_heads": 2},
        num_kv_heads=2,
        prefix=(),
        end_of_answer="<|endoftext|>",
        fused_layers=True,
    ),
    FamilyCase("bloom", prefix=()),
    FamilyCase("opt", prefix=("</s>",)),
    FamilyCase("mistral", {"num_key_value_heads": 2}, num_kv_heads=2),
    FamilyCase("gemma", {"num_key_value_heads": 1}, num_kv_heads=1, prefix=("<bos>",), end_of_answer="<eos>"),
)
IDS = [f"{case.name}-kv{case.num_kv_heads}" for case in CASES]
