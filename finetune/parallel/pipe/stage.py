"""A stage of a pipeline: the family's own model with the layers of one rank.

The model class is built with as many decoder layers as the rank holds, and its list of layers gets the numbers that
they have in the whole model, so that every parameter has its one-process name and checkpoints, adapters and
optimizer states need to know nothing of pipelines. What only the first or last stage needs (embedding; final norm
and output layer) is replaced by stubs elsewhere. Every stage runs the model's ordinary forward pass on the same
batch, with its own masks and positions; hidden states from the stage before take the place of what comes in at the
first layer, and what leaves the last layer is kept where the first module behind it would read it.

With virtual stages a rank holds several runs of layers ("chunks") of which one is active at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import paddle
from paddle import nn

from finetune.families.family import Family
from finetune.models.layers import layer_list
from finetune.models.local_layers import LocalLayers, replace_layers
from finetune.parallel.pipe.stage_plan import StagePlan


class PlaceholderModule(nn.Layer):
    """Stands for a module of another stage; has no weights and hands on what it gets."""

    is_placeholder = True

    def forward(self, hidden: Any, *_unused: Any, **_more: Any) -> Any:
        """Returns its first argument."""
        return hidden


class PlaceholderEmbedding(PlaceholderModule):
    """Stands for the embedding: gives zeros of the right shape, which the first layer's hook replaces.

    Args:
        width: Last axis of the hidden states.
        dtype: Of the weights: masks are made in the type of what the embedding gives.
        weight: The embedding itself where the output layer is tied to it: it keeps its name here.
    """

    def __init__(self, width: int, dtype: Any, weight: Any = None):
        super().__init__()
        self.width, self.dtype = width, dtype
        if weight is not None:
            self.weight = weight

    def forward(self, hidden: Any, *_unused: Any, **_more: Any) -> Any:
        """Token ids [batch, length] -> zeros [batch, length, hidden]."""
        zeros = paddle.zeros([*hidden.shape, self.width], dtype=self.dtype)
        zeros.stop_gradient = False  # recomputation gives gradients only to what asks for them
        return zeros


@dataclass
class _StageState:
    """What the hooks of a stage share during one forward pass."""

    received: Any = None
    output: Any = None
    keeps_output: bool = False

    def enter(self, _layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Puts received hidden states in the place of what comes to the first layer of a chunk."""
        if self.received is None:
            return None
        # Recomputation as a PyLayer wants a gradient for what it was called with, though nothing comes of it.
        return (self.received + inputs[0].astype(self.received.dtype) * 0, *inputs[1:])


class _Exit:
    """The forward pass of a module behind the last layer; rests while another part than the last is computed."""

    def __init__(self, state: _StageState, forward: Any = None):
        self.state, self.forward = state, forward

    @property
    def is_resting(self) -> bool:
        """Whether the module hands on what it gets: hooks that expect it to compute look at this."""
        return self.state.keeps_output

    def __call__(self, hidden: Any, *arguments: Any, **more: Any) -> Any:
        if self.forward and not self.is_resting:
            return self.forward(hidden, *arguments, **more)
        if self.is_resting and self.state.output is None:
            self.state.output = hidden
        return hidden


class Stage:
    """The part of a model that this rank computes.

    Args:
        plan: Which part.
        model: The model built by `build_stage`.
        layers: Its list of layers.
        state: Shared with the hooks.
        chunks: Layers of each chunk, as places in `layers`.
        exits: Names of modules behind the last layer that rest while a chunk is computed which is not the last.
        family: For names of fields and the order of axes.
    """

    def __init__(
        self,
        plan: StagePlan,
        model: Any,
        layers: LocalLayers,
        state: _StageState,
        *,
        chunks: list[range],
        exits: list[str],
        family: Family,
    ):
        self.plan, self.model, self.layers, self.chunks = plan, model, layers, chunks
        self._state, self._exits, self._family = state, exits, family
        self._owner = next(
            layer for layer in model.sublayers(include_self=True) if layers in layer.children()
        )

    def hidden_shape(self, batch_shape: tuple[int, ...]) -> list[int]:
        """Shape of the hidden states between layers.

        Args:
            batch_shape: Rows of the batch and tokens of each.
        """
        rows, length = batch_shape
        config = self.model.config
        width = self._family.width(config)
        if getattr(config, "sequence_parallel", False):
            return [rows * length // config.tensor_parallel_degree, width]
        return [length, rows, width] if self._family.hidden_length_first else [rows, length, width]

    @contextmanager
    def computing(self, part: int, received: Any) -> Iterator[None]:
        """Within the block the model computes one part (again, where layers are recomputed).

        Args:
            part: Of the whole model; one of this rank's.
            received: Hidden states that come in; None for the first part.
        """
        self._activate(part // self.plan.num_ranks)
        for name in self._exits:  # adapters and quantisation may have put others in their place
            layer = reduce(getattr, name.split("."), self.model)
            if not isinstance(layer.forward, _Exit):
                layer.forward = _Exit(self._state, layer.forward)
        state = self._state
        state.received, state.output = received, None
        state.keeps_output = part < self.plan.num_parts - 1
        try:
            yield
        finally:
            state.received, state.keeps_output = None, False

    def take_output(self) -> Any:
        """Hidden states that left the last layer of a part that is not the last."""
        output, self._state.output = self._state.output, None
        return output

    def _activate(self, chunk: int) -> None:
        self.layers.active = self.chunks[chunk]
        # Some of PaddleNLP's models loop over the number in a field of their own, not over the list.
        count_field = self._family.fields.num_layers
        if hasattr(self._owner, count_field):
            setattr(self._owner, count_field, len(self.chunks[chunk]))


def build_stage(model_class: Any, config: Any, *, family: Family, plan: StagePlan) -> Stage:
    """Builds the part of a model that a pipeline rank holds.

    Args:
        model_class: The family's causal language model.
        config: Of the whole model; it is that of the stage's model, too.
        family: For names of fields and modules.
        plan: Which part.
    """
    numbers = plan.layers(getattr(config, family.fields.num_layers))
    own = [number for part in numbers for number in part]
    local_config = copy.deepcopy(config)
    setattr(local_config, family.fields.num_layers, len(own))
    local_config.own_layers = own  # for layers that are not all alike
    model = model_class(local_config)
    del local_config.own_layers
    setattr(local_config, family.fields.num_layers, getattr(config, family.fields.num_layers))
    built = layer_list(model)._sub_layers.values()
    layers = replace_layers(model, dict(zip(own, built, strict=True)))
    state = _StageState()
    exits = _replace_ends(model, layers, state, family=family, plan=plan)
    chunks = [range(start, end) for start, end in pairwise(accumulate(map(len, numbers), initial=0))]
    for chunk in chunks:
        layers.all_layers[chunk.start].register_forward_pre_hook(state.enter)
    return Stage(plan, model, layers, state, chunks=chunks, exits=exits, family=family)


def _replace_ends(
    model: Any, layers: LocalLayers, state: _StageState, *, family: Family, plan: StagePlan
) -> list[str]:
    """Puts stubs in the place of modules that other stages hold; the names of those that rest for some chunks."""
    width = family.width(model.config)
    inside = {id(layer) for layer in layers.sublayers(include_self=True)}
    ends = [
        (name, layer)
        for name, layer in model.named_sublayers()
        if id(layer) not in inside and layer.parameters(include_sublayers=False)
    ]
    is_entry = {name: bool(set(name.split(".")) & set(family.entry_modules)) for name, _ in ends}
    embedding = next(layer for name, layer in ends if name.rpartition(".")[2] == family.embedding_module)
    exits = [layer for name, layer in ends if not is_entry[name]]
    tied = any(weight is embedding.weight for layer in exits for weight in layer.parameters())
    for name, layer in ends:
        if is_entry[name] and not plan.holds_first:
            kept = embedding.weight if tied and plan.holds_last else None
            stub = PlaceholderModule()
            if layer is embedding:
                stub = PlaceholderEmbedding(width, layer.weight.dtype, kept)
            _put(model, name, stub)
        elif not is_entry[name] and not plan.holds_last:
            exit_: Any = PlaceholderModule()
            exit_.forward = _Exit(state)
            _put(model, name, exit_)
    rest = plan.holds_last and plan.num_chunks > 1
    return [name for name, _ in ends if not is_entry[name]] if rest else []


def _put(model: Any, name: str, layer: nn.Layer) -> None:
    *parents, last = name.split(".")
    setattr(reduce(getattr, parents, model), last, layer)
