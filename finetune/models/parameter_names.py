"""One name for every parameter, also for those that stand under two."""

from __future__ import annotations

from typing import Any


def named_weights(model: Any) -> dict[str, Any]:
    """Name -> parameter, each parameter once.

    An embedding that is also the output layer goes by the embedding's name, whichever of the two the model
    registers first: its stages in a pipeline hold one or the other and must call it the same. The embedding is
    the one deeper inside the model.
    """
    weights = {id(parameter) for parameter in model.parameters()}
    names: dict[int, str] = {}
    tensors: dict[int, Any] = {}
    for name, tensor in model.state_dict().items():
        key = id(tensor)
        if key in weights and (key not in names or name.count(".") > names[key].count(".")):
            names[key], tensors[key] = name, tensor
    return {names[key]: tensor for key, tensor in tensors.items()}
