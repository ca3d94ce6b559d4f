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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import paddle

from finetune.parallel.sharding.flat_slices import no_grad_no_autocast, plan_buckets
from finetune.parallel.sharding.layer_units import UnitGather, divide
from finetune.parallel.sharding.replicas import DEFAULTS, ReplicaOptions
from finetune.parallel.sharding.sliced_replicas import SliceHolders

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups


@dataclass
class _Unit:
    """Parameters that are gathered and freed together.

    Attributes:
        parameters: By structured name, frozen ones too.
        gather: Gives them their memory.
        is_whole: Whether they have their memory now.
        in_backward: Whether they were gathered for backward, which is not over.
        had_backward: Whether that happened in the micro-batch that was the last to end.
        has_backward: The same of the one that goes on.
        next: The unit of the layer behind this one, if any.
        previous: The unit of the layer before.
    """

    parameters: dict[str, Any]
    gather: UnitGather
    is_whole: bool = True
    in_backward: bool = False
    had_backward: bool = False
    has_backward: bool = False
    next: _Unit | None = None
    previous: _Unit | None = None


class GatheredReplicas(SliceHolders):
    """Stage 3: each rank keeps its slice of every parameter, trained or frozen.

    All ranks of the sharding group must run forward and backward equally often, also in evaluation; where they
    cannot, `whole_parameters` makes the model usable without communication.
    """

    stage = 3

    def __init__(self, model: Any, groups: ProcessGroups, options: ReplicaOptions = DEFAULTS):
        super().__init__(model, groups, options)
        self._all_whole, self._backward_began = 0, False
        self._stored: dict[str, Any] = dict(self._slices)
        frame, units = divide(model, options.layers)
        self._frame, self.units = self._hold(frame), [self._hold(unit) for unit in units]
        for unit, following in zip(self.units, self.units[1:], strict=False):
            unit.next, following.previous = following, unit
        model.register_forward_pre_hook(lambda *_: self._gather(self._frame))
        model.register_forward_post_hook(lambda _, __, outputs: self._after_model(outputs))
        for unit, layer in zip(self.units, options.layers, strict=True):
            self._watch(unit, layer)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Gathers all parameters and keeps them until it ends; changes of them are kept."""
        units = (self._frame, *self.units)
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

    def begin_step(self, num_micro_batches: int) -> None:
        """To be called before the first forward pass of a step."""
        self._sums.begin_step(num_micro_batches * self._options.num_parts)

    def after_micro_batch(self) -> None:
        """Scatters the gradients that are left, the frame's for one, and frees what is still whole."""
        self._backward_began = False
        for unit in (*reversed(self.units), self._frame):
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
        self._sums.end_pass()

    def sum_gradients(self) -> None:
        """Leaves the sums of all micro-batches in the slices' gradients."""
        with no_grad_no_autocast():
            self._sums.finish()

    # ---------------------------------------------------------------- hooks

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

    def _hold(self, parameters: dict[str, Any]) -> _Unit:
        """Takes the slices of a unit's parameters and frees these."""
        for name, parameter in parameters.items():
            self._shapes[name] = list(parameter.shape)
            if name not in self._stored:
                self._stored[name] = self.slice_of(name, parameter)
        unit = _Unit(parameters, UnitGather(parameters, self._stored, self.groups.sharding))
        self._free(unit)
        return unit

    def _begin_early(self, unit: _Unit) -> None:
        """Begins to gather what will be needed next."""
        if self._options.overlaps:
            self._begin_gather(unit)

    def _begin_gather(self, unit: _Unit) -> None:
        if not (unit.is_whole or unit.gather.under_way):
            unit.gather.begin()

    def _gather(self, unit: _Unit) -> None:
        """Gives the parameters their memory and values."""
        if unit.is_whole:
            return
        self._begin_gather(unit)
        unit.is_whole = True
        for parameter, whole in unit.gather.take():
            whole._share_buffer_to(parameter)

    def _free(self, unit: _Unit) -> None:
        """Takes the parameters' memory, unless all are to stay whole."""
        for _ in unit.gather.take():
            pass  # nothing came to need it
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
                members = {names[place]: self.trained[names[place]] for place in bucket}
                gradients, present = self._local.take(members)
                self._seen |= present
                self._sums.begin(list(members), gradients)


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
