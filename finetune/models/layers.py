"""The layers and parameters of a PaddleNLP model, found without knowing its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unique_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
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
    return unique_tensors({name: each for name, each in model.state_dict().items() if id(each) in weights})


def decoder_layers(model: Any) -> list[Any]:
    """All decoder layers of a model."""
    return list(layer_list(model)._sub_layers.values())


def layer_list(model: Any) -> Any:
    """The one list of a model that holds its decoder layers, a `paddle.nn.LayerList`.

    Raises:
        RuntimeError: There is none, or there are several beside each other.
    """
    from paddle import nn

    lists = [(name, layer) for name, layer in model.named_sublayers() if isinstance(layer, nn.LayerList)]
    outer = [layer for name, layer in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1:
        raise RuntimeError(f"{type(model).__name__} has {len(outer)} lists of layers, expected one")
    return outer[0]


def find_layer(model: Any, last_name: str) -> Any:
    """The one sublayer whose name ends in `last_name`.

    Raises:
        RuntimeError: There is none or more than one: the family's record is wrong.
    """
    found = [layer for name, layer in model.named_sublayers() if name.rpartition(".")[2] == last_name]
    if len(found) != 1:
        raise RuntimeError(f"{type(model).__name__} has {len(found)} layers called {last_name}, expected one")
    return found[0]
