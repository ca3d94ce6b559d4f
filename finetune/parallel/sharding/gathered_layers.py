"""Sharding stage 3: weights live as slices, and each decoder layer's are whole only while the layer works.

A unit is a decoder layer's parameters; one more, the frame, has all others (embedding, last norm, head, and whatever
several layers share). Cost per micro-batch: every layer is gathered twice, for forward and for backward, and its
gradients are scattered once; the frame is gathered once and stays until the micro-batch ends. Nothing overlaps with
computing.

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

from finetune.models.layers import named_weights
from finetune.parallel.sharding.flat_slices import gather, no_grad_no_autocast, plan_buckets
from finetune.parallel.sharding.replicas import SlicedGradientReplicas

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups


@dataclass
class _Unit:
    """Parameters that are gathered and freed together.

    Attributes:
        parameters: By structured name, frozen ones too.
        is_whole: Whether they have their memory now.
        in_backward: Whether they were gathered for backward, which is not over.
    """

    parameters: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = True
    in_backward: bool = False


class GatheredReplicas(SlicedGradientReplicas):
    """Stage 3: each rank keeps its slice of every parameter, trained or frozen.

    All ranks of the sharding group must run forward and backward equally often, also in evaluation; where they
    cannot, `whole_parameters` makes the model usable without communication.

    Args:
        model: The Layer whose forward is called.
        groups: The process groups.
        layers: Its decoder layers; the first tensor that they are given is the hidden states.
        master_gradients: Whether gradients are added up in float32 whatever the parameters' dtype.
    """

    stage = 3
    runs_every_micro_batch = True

    def __init__(
        self, model: Any, groups: ProcessGroups, *, layers: Sequence[Any], master_gradients: bool = False
    ):
        super().__init__(model, groups, master_gradients=master_gradients)
        self._all_whole = 0
        self._backward_began = False
        self._frame, self._units = _divide(model, layers)
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
            self._free(unit)

    def share_updated(self) -> None:
        """Nothing to do: the updated slices are gathered when a layer needs them."""

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
        unit.in_backward = True
        self._gather(unit)

    def _end_backward(self, unit: _Unit) -> None:
        if unit.in_backward:
            unit.in_backward = False
            self._scatter_gradients(unit)
            self._free(unit)

    # ---------------------------------------------------------------- memory of a unit

    def _gather(self, unit: _Unit) -> None:
        """Gives the parameters their memory and values."""
        if unit.is_whole:
            return
        unit.is_whole = True
        names = list(unit.parameters)
        with no_grad_no_autocast():
            for bucket in plan_buckets(unit.parameters.values()):
                members = [names[place] for place in bucket]
                wholes = gather(
                    [self._stored[name] for name in members],
                    [self._shapes[name] for name in members],
                    self.groups.sharding,
                )
                for name, whole in zip(members, wholes, strict=True):
                    whole._share_buffer_to(unit.parameters[name])

    def _free(self, unit: _Unit) -> None:
        """Takes the parameters' memory, unless all are to stay whole."""
        if unit.is_whole and not self._all_whole:
            unit.is_whole = False
            for parameter in unit.parameters.values():
                parameter._clear_data()

    def _store(self, unit: _Unit) -> None:
        """Takes the slices from the whole parameters."""
        for name, parameter in unit.parameters.items():
            paddle.assign(self.slice_of(name, parameter), output=self._stored[name])

    def _scatter_gradients(self, unit: _Unit) -> None:
        with no_grad_no_autocast():
            self._reduce(name for name in unit.parameters if name in self.trained)


def _divide(model: Any, layers: Sequence[Any]) -> tuple[_Unit, list[_Unit]]:
    """The frame and one unit per layer; what two layers share belongs to the frame."""
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
    frame, units = _Unit(), [_Unit() for _ in layers]
    for name, parameter in named_weights(model).items():
        numbers = owners.get(id(parameter), set())
        alone = len(numbers) == 1 and id(parameter) not in outside
        unit = units[next(iter(numbers))] if alone else frame
        unit.parameters[name] = parameter
    return frame, units


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
