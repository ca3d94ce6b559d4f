"""Which parameters a decoder layer alone uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.models.layers import named_weights


def divide(model: Any, layers: Sequence[Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The parameters of the frame, and those of each layer, by structured name.

    The frame has what stands outside of the layers (embedding, last norm, head) and what several of them share.

    Args:
        model: The Layer whose forward is called.
        layers: Its decoder layers.
    """
    owners: dict[int, set[int]] = {}
    for number, layer in enumerate(layers):
        for parameter in layer.parameters():
            owners.setdefault(id(parameter), set()).add(number)
    inner = {id(module) for layer in layers for module in layer.sublayers(include_self=True)}
    outside = {
        id(parameter)
        for module in model.sublayers(include_self=True)
        if id(module) not in inner
        for parameter in module.parameters(include_sublayers=False)
    }
    frame: dict[str, Any] = {}
    units: list[dict[str, Any]] = [{} for _ in layers]
    for name, parameter in named_weights(model).items():
        numbers = owners.get(id(parameter), set())
        alone = len(numbers) == 1 and id(parameter) not in outside
        unit = units[next(iter(numbers))] if alone else frame
        unit[name] = parameter
    return frame, units
