"""Weights that were updated in slices, on their way back into the parameters while the next forward pass begins.

All gathers begin when the optimizer has stepped, in the order in which a forward pass uses the parameters; a hook of each
decoder layer waits for the layer's own, one of the model for the rest. Nobody waits for a gather to begin, so that
ranks need not come to their hooks together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import paddle

from finetune.parallel.sharding.layer_units import UnitGather, divide

if TYPE_CHECKING:
    from finetune.processes.groups import Group

_OWN_MEMORY_BYTES = 1 << 20


class UpdatedWeights:
    """Puts updated slices together in the parameters.

    Args:
        model: The Layer whose forward is called; it and its decoder layers get a hook for good.
        layers: Its decoder layers.
        slices: What this rank updates, by the name of the parameter.
        group: The sharding group.
        overlaps: Whether gathers may be under way when `begin` returns.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[Any],
        slices: Mapping[str, Any],
        group: Group,
        *,
        overlaps: bool = True,
    ):
        self._overlaps = overlaps
        frame, units = divide(model, layers)
        self.units = [
            UnitGather(
                {name: parameter for name, parameter in unit.items() if name in slices},
                slices,
                group,
                own_memory_bytes=_OWN_MEMORY_BYTES,
            )
            for unit in (frame, *units)
        ]
        for module, unit in zip((model, *layers), self.units, strict=True):
            module.register_forward_pre_hook(lambda *_, unit=unit: _take(unit))

    def begin(self) -> None:
        """To be called when the slices are updated; they must be left alone until `finish`."""
        for unit in self.units:
            unit.begin()
        if not self._overlaps:
            self.finish()

    def finish(self) -> None:
        """Returns when the parameters hold all that has begun."""
        for unit in self.units:
            _take(unit)


def _take(unit: UnitGather) -> None:
    for parameter, whole in unit.take():
        paddle.assign(whole, output=parameter)
