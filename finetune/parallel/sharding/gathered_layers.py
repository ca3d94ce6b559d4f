"""Sharding stage 3: weights live as slices, and each decoder layer's are whole only while the layer works.

A unit is a decoder layer's parameters; one more, the frame, has all others (embedding, last norm, head, and whatever
several layers share). Cost per micro-batch: every layer is gathered twice, for forward and for backward, and its
gradients are scattered once; the frame is gathered once and stays until the micro-batch ends. While a layer computes,
the next one's weights are on their way, and the sums of the gradients of those before: in a forward pass the next
layer's, in a backward pass the previous layer's, if that had a backward pass in the micro-batch before.

When a layer's parameters are freed, the Parameter objects stay and lose their memory. What autograd saved for backward
refers to the same objects, so it sees the weights again as soon as the memory is given back: before the gradient of
the layer's output is used. They go for good when the gradient of its input is complete: a decoder layer's weights all
act on the hidden states that it is given, so nothing needs them afterwards.

    forward   of layer i:  gather -> compute -> free
    backward  of layer i:  gather <- gradient of output | compute | gradient of input -> scatter gradients, free

Recompute runs a layer's forward once more within backward. Then it is left whole, as its backward follows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import paddle

from finetune.parallel.sharding.flat_slices import GatheredTensors, no_grad_no_autocast, plan_buckets
from finetune.parallel.sharding.layer_units import divide
from finetune.parallel.sharding.sliced_replicas import SliceHolders

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups


@dataclass
class _Unit:
    """Parameters that are gathered and freed together.

    Attributes:
        parameters: By structured name, frozen ones too.
        is_whole: Whether they have their memory now.
        in_backward: Whether they were gathered for backward, which is not over.
        had_backward: Whether that happened in the micro-batch that was the last to end.
        has_backward: The same of the one that goes on.
        arriving: Gathers that have begun, each with the names of what it brings.
        next: The unit of the layer behind this one, if any.
        previous: The unit of the layer before.
    """

    parameters: dict[str, Any]
    is_whole: bool = True
    in_backward: bool = False
    had_backward: bool = False
    has_backward: bool = False
    arriving: list[tuple[list[str], GatheredTensors]] = field(default_factory=list)
    next: _Unit | None = None
    previous: _Unit | None = None


class GatheredReplicas(SliceHolders):
    """Stage 3: each rank keeps its slice of every parameter, trained or frozen.

    All ranks of the sharding group must run forward and backward equally often, also in evaluation; where they
    cannot, `whole_parameters` makes the model usable without communication.

    Args:
        model: The Layer whose forward is called.
        groups: The process groups.
        layers: Its decoder layers; the first tensor that they are given is the hidden states.
        master_gradients: Whether gradients are added up in float32 whatever the parameters' dtype.
        overlaps: Whether ranks exchange while they compute; the bits are the same either way.
    """

    stage = 3
    runs_every_micro_batch = True

    def __init__(
        self,
        model: Any,
        groups: ProcessGroups,
        *,
        layers: Sequence[Any],
        master_gradients: bool = False,
        overlaps: bool = True,
    ):
        super().__init__(model, groups, master_gradients=master_gradients, overlaps=overlaps)
        self._overlaps, self._all_whole, self._backward_began = overlaps, 0, False
        frame, units = divide(model, layers)
        self._frame, self._units = _Unit(frame), [_Unit(unit) for unit in units]
        for unit, following in zip(self._units, self._units[1:], strict=False):
            unit.next, following.previous = following, unit
        self._stored: dict[str, Any] = dict(self._slices)
        for unit in (self._frame, *self._units):
            for name, parameter in unit.parameters.items():
                self._shapes[name] = list(parameter.shape)
                if name not in self._stored:
                    self._stored[name] = self.slice_of(name, parameter)
            self._free(unit)
        model.register_forward_pre_hook(lambda *_: self._before_model())
        model.register_forward_post_hook(lambda _, __, outputs: self._after_model(outputs))
        for unit, layer in zip(self._units, layers, strict=True):
            self._watch(unit, layer)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Gathers all parameters and keeps them until it ends; changes of them are kept."""
        units = (self._frame, *self._units)
        for unit in units:
            self._gather(unit)
        self._all_whole += 1
        try:
            yield
        finally:
            self._all_whole -= 1
            for unit in units:
                self._store(unit)
                if not self._all_whole:
                    self._free(unit)

    def after_micro_batch(self) -> None:
        """Scatters the gradients that are left, the frame's for one, and frees what is still whole."""
        self._backward_began = False
        for unit in (*reversed(self._units), self._frame):
            has_gradient = any(
                self._local.exists(parameter)
                for name, parameter in unit.parameters.items()
                if name in self.trained
            )
            if unit is self._frame or has_gradient:
                self._scatter_gradients(unit)
            unit.in_backward = False
            unit.had_backward, unit.has_backward = unit.has_backward, False
            self._free(unit)

    def sum_gradients(self) -> None:
        """Leaves the sums of all micro-batches in the slices' gradients."""
        with no_grad_no_autocast():
            self._sums.finish()
            self._sum_over_replicas()

    # ---------------------------------------------------------------- hooks

    def _before_model(self) -> None:
        self._gather(self._frame)

    def _after_model(self, outputs: Any) -> None:
        if paddle.is_grad_enabled():
            _watch_gradients(outputs, self._begin_model_backward)
        else:
            self._free(self._frame)

    def _begin_model_backward(self, _gradient: Any) -> None:
        # Freed already where a pipeline ended another micro-batch since this one's forward.
        self._gather(self._frame)
        self._backward_began = True

    def _watch(self, unit: _Unit, layer: Any) -> None:
        """Puts the hooks of a unit on its layer."""

        def before(_layer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._gather(unit)
            if unit.next and not (self._backward_began or unit.in_backward):
                self._begin_early(unit.next)
            if paddle.is_grad_enabled() and not unit.in_backward:
                hidden = next(_tensors((arguments, keywords)), None)
                if hidden is not None and not hidden.stop_gradient:
                    hidden.register_hook(lambda _: self._end_backward(unit))

        def after(_layer: Any, _arguments: Any, outputs: Any) -> None:
            if paddle.is_grad_enabled() and not unit.in_backward:
                _watch_gradients(outputs, lambda _: self._begin_backward(unit))
            if not (self._backward_began or unit.in_backward):
                self._free(unit)

        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_post_hook(after)

    def _begin_backward(self, unit: _Unit) -> None:
        self._backward_began = True
        unit.in_backward = unit.has_backward = True
        self._gather(unit)
        if unit.previous and unit.previous.had_backward:
            self._begin_early(unit.previous)

    def _end_backward(self, unit: _Unit) -> None:
        if unit.in_backward:
            unit.in_backward = False
            self._scatter_gradients(unit)
            self._free(unit)

    # ---------------------------------------------------------------- memory of a unit

    def _begin_early(self, unit: _Unit) -> None:
        """Begins to gather what will be needed next."""
        if self._overlaps:
            self._begin_gather(unit)

    def _begin_gather(self, unit: _Unit) -> None:
        if unit.is_whole or unit.arriving:
            return
        names = list(unit.parameters)
        with no_grad_no_autocast():
            for bucket in plan_buckets(unit.parameters.values()):
                members = [names[place] for place in bucket]
                slices = [self._stored[name] for name in members]
                shapes = [self._shapes[name] for name in members]
                unit.arriving.append((members, GatheredTensors(slices, shapes, self.groups.sharding)))

    def _gather(self, unit: _Unit) -> None:
        """Gives the parameters their memory and values."""
        if unit.is_whole:
            return
        self._begin_gather(unit)
        unit.is_whole = True
        with no_grad_no_autocast():
            for names, gathered in unit.arriving:
                for name, whole in zip(names, gathered.wait(), strict=True):
                    whole._share_buffer_to(unit.parameters[name])
        unit.arriving.clear()

    def _free(self, unit: _Unit) -> None:
        """Takes the parameters' memory, unless all are to stay whole."""
        while unit.arriving:  # nothing came to need it
            unit.arriving.pop()[1].wait()
        if unit.is_whole and not self._all_whole:
            unit.is_whole = False
            for parameter in unit.parameters.values():
                parameter._clear_data()

    def _store(self, unit: _Unit) -> None:
        """Takes the slices from the whole parameters."""
        for name, parameter in unit.parameters.items():
            paddle.assign(self.slice_of(name, parameter), output=self._stored[name])

    def _scatter_gradients(self, unit: _Unit) -> None:
        names = [name for name in unit.parameters if name in self.trained]
        with no_grad_no_autocast():
            for bucket in plan_buckets(self.trained[name] for name in names):
                members = [names[place] for place in bucket]
                gradients = []
                for name in members:
                    if self._local.exists(self.trained[name]):
                        self._seen.add(name)
                    gradients.append(self._local.get(self.trained[name]).flatten())  # keeps the memory
                    self._local.clear(self.trained[name])
                self._sums.begin(members, gradients)


def _tensors(values: Any) -> Iterator[Any]:
    """All tensors, in order, in nested tuples, lists and dicts."""
    if isinstance(values, paddle.Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _watch_gradients(outputs: Any, hook: Callable[[Any], None]) -> None:
    """Has a function called when the gradient of any tensor in nested outputs is complete."""
    for tensor in _tensors(outputs):
        if not tensor.stop_gradient:
            tensor.register_hook(hook)
