"""Which parameters a decoder layer alone uses, and how they come together from slices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.models.layers import named_weights
from finetune.parallel.sharding.flat_slices import (
    FilledTensor,
    GatheredTensors,
    no_grad_no_autocast,
    plan_buckets,
)

if TYPE_CHECKING:
    from finetune.processes.groups import Group


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


class UnitGather:
    """The parameters of a unit, on their way from the slices that the ranks of a group hold.

    Args:
        parameters: By name, while they are whole.
        slices: What this rank holds of each.
        group: The sharding group.
        own_memory_bytes: From which size on a parameter is gathered into its own memory, where the ranks share out
            its elements evenly; others travel together through a buffer.

    Attributes:
        under_way: Gathers that have begun, each with the names of what has to be put in place.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        slices: Mapping[str, Any],
        group: Group,
        *,
        own_memory_bytes: float = math.inf,
    ):
        def is_large(parameter: Any) -> bool:
            num_bytes = parameter.size * parameter.element_size()
            return bool(num_bytes >= own_memory_bytes and parameter.size % group.size == 0)

        self._parameters, self._slices, self._group = parameters, slices, group
        self._shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
        self._large = [name for name, parameter in parameters.items() if is_large(parameter)]
        small = [name for name in parameters if name not in self._large]
        planned = plan_buckets(parameters[name] for name in small)
        self._buckets = [[small[place] for place in places] for places in planned]
        self.under_way: list[tuple[list[str], FilledTensor | GatheredTensors]] = []

    def begin(self) -> None:
        """Begins all gathers; the slices must be left alone until they are taken."""
        with no_grad_no_autocast():
            for name in self._large:
                filled = FilledTensor(self._parameters[name], self._slices[name], self._group)
                self.under_way.append(([], filled))
            for names in self._buckets:
                slices = [self._slices[name] for name in names]
                shapes = [self._shapes[name] for name in names]
                self.under_way.append((names, GatheredTensors(slices, shapes, self._group)))

    def take(self) -> Iterator[tuple[Any, Any]]:
        """Waits for what has begun; gives each parameter that is still to be put in place, and its new memory."""
        if not self.under_way:
            return
        with no_grad_no_autocast():
            while self.under_way:
                names, gathered = self.under_way.pop(0)
                for name, whole in zip(names, gathered.wait() or (), strict=True):
                    yield self._parameters[name], whole
