"""One name for every parameter, also for those that stand under two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def one_name_each(state: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> tensor, each tensor once.

    An embedding that is also the output layer goes by the embedding's name, whichever of the two the model
    registers first: its stages in a pipeline hold one or the other and must call it the same. The embedding is
    the one deeper inside the model.
    """
    names: dict[int, str] = {}
    for name, tensor in state.items():
        known = names.setdefault(id(tensor), name)
        if name.count(".") > known.count("."):
            names[id(tensor)] = name
    return {name: state[name] for name in names.values()}


def named_weights(model: Any) -> dict[str, Any]:
    """Name -> parameter, each parameter once; buffers are left out."""
    weights = {id(parameter) for parameter in model.parameters()}
    return one_name_each({name: each for name, each in model.state_dict().items() if id(each) in weights})
