"""Weights that were updated in slices, on their way back into the parameters while the next forward pass begins.

All gathers begin when the optimizer has stepped, in the order in which a forward pass uses the parameters; a hook of each
decoder layer waits for the layer's own, one of the model for the rest. Nobody waits for a gather to begin, so that
ranks need not come to their hooks together. A large parameter is gathered into its own memory; small ones, and those
whose elements the ranks do not share out evenly, travel together through a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import paddle

from finetune.parallel.sharding.flat_slices import (
    FilledTensor,
    GatheredTensors,
    no_grad_no_autocast,
    plan_buckets,
)
from finetune.parallel.sharding.layer_units import divide

if TYPE_CHECKING:
    from finetune.processes.groups import Group

_OWN_MEMORY_BYTES = 1 << 20


@dataclass
class _Arrivals:
    """What a layer waits for.

    Attributes:
        large: Names of parameters that are gathered into their own memory.
        buckets: Names of others, by what travels together.
        under_way: Gathers that have begun, each with the names that it has to put in place, if any.
    """

    large: list[str] = field(default_factory=list)
    buckets: list[list[str]] = field(default_factory=list)
    under_way: list[tuple[list[str], FilledTensor | GatheredTensors]] = field(default_factory=list)


class UpdatedWeights:
    """Puts updated slices together in the parameters.

    Args:
        model: The Layer whose forward is called; it and its decoder layers get a hook for good.
        layers: Its decoder layers.
        trained: Trained parameters by name.
        slices: What this rank updates of them.
        group: The sharding group.
        overlaps: Whether gathers may be under way when `begin` returns.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[Any],
        *,
        trained: Mapping[str, Any],
        slices: Mapping[str, Any],
        group: Group,
        overlaps: bool = True,
    ):
        self._trained, self._slices, self._group, self._overlaps = trained, slices, group, overlaps
        frame, units = divide(model, layers)
        self._arrivals = [self._plan([name for name in unit if name in trained]) for unit in (frame, *units)]
        for module, arrivals in zip((model, *layers), self._arrivals, strict=True):
            module.register_forward_pre_hook(lambda *_, arrivals=arrivals: self._take(arrivals))

    def begin(self) -> None:
        """To be called when the slices are updated; they must be left alone until `finish`."""
        with no_grad_no_autocast():
            for arrivals in self._arrivals:
                self._begin(arrivals)
        if not self._overlaps:
            self.finish()

    def finish(self) -> None:
        """Returns when the parameters hold all that has begun."""
        for arrivals in self._arrivals:
            self._take(arrivals)

    def _plan(self, names: list[str]) -> _Arrivals:
        arrivals = _Arrivals()
        small: list[str] = []
        for name in names:
            parameter = self._trained[name]
            num_bytes = parameter.size * parameter.element_size()
            is_large = num_bytes >= _OWN_MEMORY_BYTES and parameter.size % self._group.size == 0
            (arrivals.large if is_large else small).append(name)
        planned = plan_buckets([self._trained[name] for name in small])
        arrivals.buckets = [[small[place] for place in places] for places in planned]
        return arrivals

    def _begin(self, arrivals: _Arrivals) -> None:
        for name in arrivals.large:
            filled = FilledTensor(self._trained[name], self._slices[name], self._group)
            arrivals.under_way.append(([], filled))
        for names in arrivals.buckets:
            pieces = [self._slices[name] for name in names]
            shapes = [self._trained[name].shape for name in names]
            arrivals.under_way.append((names, GatheredTensors(pieces, shapes, self._group)))

    def _take(self, arrivals: _Arrivals) -> None:
        if not arrivals.under_way:
            return
        with no_grad_no_autocast():
            for names, gathered in arrivals.under_way:
                wholes = gathered.wait()
                for name, whole in zip(names, wholes or (), strict=True):
                    paddle.assign(whole, output=self._trained[name])
        arrivals.under_way.clear()
