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


CASES = (
    FamilyCase("llama"),
    FamilyCase("llama", {"num_key_value_heads": 2}, num_kv_heads=2),
)
IDS = [f"{case.name}-kv{case.num_kv_heads}" for case in CASES]
