"""The decoder layers that a process holds, when it holds a part of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paddle import nn

from finetune.models.layers import layer_list


class LocalLayers(nn.LayerList):
    """A rank's decoder layers under their numbers in the whole model; only the active ones are seen.

    Args:
        layers: Number in the whole model -> layer, in ascending order.

    Attributes:
        active: Places, among the layers held here, of those that a forward pass runs.
    """

    def __init__(self, layers: Mapping[int, nn.Layer]):
        super().__init__()
        for number, layer in layers.items():
            self.add_sublayer(str(number), layer)
        self.active = range(len(layers))

    @property
    def all_layers(self) -> list[nn.Layer]:
        """All layers that are held here."""
        return list(self._sub_layers.values())

    def __iter__(self) -> Iterator[nn.Layer]:
        return iter(self._active_layers())

    def __len__(self) -> int:
        return len(self._active_layers())

    def __getitem__(self, index: Any) -> Any:
        return self._active_layers()[index]

    def _active_layers(self) -> list[nn.Layer]:
        return self.all_layers[self.active.start : self.active.stop]


def replace_layers(model: Any, layers: Mapping[int, nn.Layer]) -> LocalLayers:
    """Leaves a model these decoder layers, under their numbers in the whole model, wherever it holds its list."""
    built, local = layer_list(model), LocalLayers(layers)
    for owner in model.sublayers(include_self=True):
        for name, layer in owner._sub_layers.items():
            if layer is built:
                setattr(owner, name, local)
    return local


def is_stage(model: Any) -> bool:
    """Whether a model is a stage of a pipeline, with a part of the layers."""
    return isinstance(layer_list(model), LocalLayers)


def layer_numbers(layers: nn.LayerList) -> list[int]:
    """Numbers, in the whole model, of the layers that a forward pass runs."""
    numbers = [int(name) for name in layers._sub_layers]
    return [numbers[place] for place in layers.active] if isinstance(layers, LocalLayers) else numbers
