"""Which generation of InternLM a config.json is of: early folders of the second have the `model_type` of the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST, SECOND = "InternLM", "InternLM2"


def names_generation(config: Mapping[str, Any]) -> str | None:
    """`FIRST` or `SECOND` by the classes that a config.json names; None where it names neither."""
    auto_map = config.get("auto_map")
    named = [*(config.get("architectures") or ()), *(auto_map.values() if isinstance(auto_map, dict) else ())]
    names = [str(name).rpartition(".")[2] for name in named]
    if any(name.startswith(SECOND) for name in names):
        return SECOND
    return FIRST if any(name.startswith(FIRST) for name in names) else None
