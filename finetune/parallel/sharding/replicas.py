"""The data axis: gradient sums over replicas, and the sharding stages that share out what replicas would repeat.

Replicas hold the same weights and take different samples. Gradients are sums over samples (the loss is divided by the
number of label tokens of the whole global batch beforehand), so the gradient of a step is their plain sum over all
replicas. ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) spares memory among the s ranks of the sharding group:

    stage 0   every rank holds all weights, gradients and optimizer state (`bucketed_replicas.py`)
    stage 1   each rank updates 1/s of every parameter: optimizer state / s
    stage 2   gradients are summed after every micro-batch, each rank keeps 1/s: gradients / s between micro-batches
    stage 3   weights too are kept as slices and gathered layer by layer (`gathered_layers.py`)

Slices are flat (`flat_slices.py`), which suits optimizers that treat every element alike, as AdamW does. A slice is a
Parameter itself, so that moments and float32 master weights are made for it as for any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import paddle
from paddle.base.framework import EagerParamBase
from paddle.utils import unique_name

from finetune.models.layers import named_weights
from finetune.parallel.sharding.flat_slices import (
    cut,
    gather,
    join,
    no_grad_no_autocast,
    plan_buckets,
    reduce_scatter,
    sum_over,
)
from finetune.parallel.sharding.local_gradients import MasterGradients, ParameterGradients

if TYPE_CHECKING:
    from finetune.processes.groups import Group, ProcessGroups


class Replicas:
    """A single replica, and the interface of all stages.

    A step is: `begin_step`; for each micro-batch forward, backward and `after_micro_batch`; then `sum_gradients`, `squared_norm`
    for clipping, `drop_absent` and `scale_gradients`, the optimizer's step, `after_update`, `clear_gradients`. All ranks must call
    `after_micro_batch` equally often (a rank without samples calls it alone); stage 3 moreover needs a forward and
    backward of some micro-batch, which may weigh nothing, before each call.

    Attributes:
        stage: The sharding stage.
        runs_every_micro_batch: Whether a rank without samples must run a micro-batch all the same.
        trained: Trained parameters by structured name.
    """

    stage = 0
    runs_every_micro_batch = False

    def __init__(self, model: Any, groups: ProcessGroups, *, master_gradients: bool = False):
        self.groups = groups
        self.trained = {
            name: parameter for name, parameter in named_weights(model).items() if not parameter.stop_gradient
        }
        self._local = MasterGradients(self.trained.values()) if master_gradients else ParameterGradients()
        self._seen: set[str] = set()

    # ---------------------------------------------------------------- for the optimizer and checkpoints

    def optimizer_parameters(self) -> list[Any]:
        """What the optimizer updates on this rank: parameters, or slices of them."""
        return list(self._updated().values())

    def tensor_names(self) -> dict[str, str]:
        """Paddle's name of each updated parameter or slice, which keys optimizer state, to the structured name."""
        return {tensor.name: name for name, tensor in self._updated().items()}

    def is_decayed(self, tensor_name: str) -> bool:
        """Whether weight decay is for a tensor that the optimizer updates, by Paddle's name: matrices only."""
        return tensor_name in self._decayed

    def slice_of(self, name: str, whole: Any) -> Any:
        """What this rank updates out of a tensor that has a parameter's shape, say a moment."""
        return whole

    def whole_of(self, name: str, part: Any) -> Any:
        """The whole tensor of which the ranks of the sharding group hold slices; all must call it."""
        return part

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a trained parameter, also while its memory is freed."""
        return tuple(self.trained[name].shape)

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Within it the model's parameters are whole, to be read or changed; all ranks must enter."""
        yield

    # ---------------------------------------------------------------- in a step

    def begin_step(self, num_micro_batches: int) -> None:
        """To be called before the first forward pass of a step, with the number of micro-batches of this rank."""

    def after_micro_batch(self) -> None:
        """To be called when a micro-batch's backward is done."""

    def sum_gradients(self) -> None:
        """Sums the gradients over all replicas; a rank without one counts as zero.

        Which parameters have a gradient on some replica is found out later (`presence`), so that nothing waits for it:
        with several replicas all have one until `drop_absent`.
        """
        with no_grad_no_autocast():
            self._note_present()
            for name in self._seen:
                self._local.hand_over(self.trained[name])

    def presence(self) -> Any:
        """float64 [trained] or [0]: above 0 where a replica has a gradient of the parameter; for `drop_absent`.

        Empty where there is one replica, which knows it without asking.
        """
        if self.groups.data.size == 1:
            return paddle.zeros([0], dtype="float64")
        flags = paddle.to_tensor([float(name in self._seen) for name in self.trained], dtype="float64")
        if self.trained:
            self.groups.data.all_reduce(flags, op="max")
        return flags

    def drop_absent(self, presence: Sequence[float]) -> None:
        """Takes away the zeros that stand for gradients which no replica has: the optimizer passes these parameters over.

        Args:
            presence: The numbers of `presence`, read from the device.
        """
        updated = self._updated()
        for name, flag in zip(self.trained, presence, strict=False):
            if not flag:
                updated[name].clear_gradient(False)

    def gradients(self) -> Iterator[tuple[str, Any]]:
        """Structured name and gradient (of this rank's slice) of what has one; after `sum_gradients`."""
        for name, tensor in self._updated().items():
            if tensor.grad is not None:
                yield name, tensor.grad

    def squared_norm(self, counts: Callable[[str], bool]) -> Any:
        """This rank's share of the squared L2 norm of all gradients.

        Args:
            counts: Whether this rank counts a parameter, by its name; asked on the first of equal replicas only.

        Returns:
            float64 [1], on the device; the sum over all ranks is the whole.
        """
        with no_grad_no_autocast():
            squares = [
                (gradient.astype("float32") ** 2).sum()
                for name, gradient in (self.gradients() if self._copies.is_first else ())
                if counts(name)
            ]
            if not squares:
                return paddle.zeros([1], dtype="float64")
            return paddle.stack(squares).astype("float64").sum(keepdim=True)

    def scale_gradients(self, factor: float) -> None:
        """Multiplies all gradients, in place."""
        with no_grad_no_autocast():
            for _, gradient in self.gradients():
                gradient.scale_(factor)

    def after_update(self) -> None:
        """To be called when the optimizer has changed what it updates."""

    def clear_gradients(self) -> None:
        """Frees all gradients."""
        self._seen.clear()
        for tensor in self._updated().values():
            tensor.clear_gradient(False)
        for parameter in self.trained.values():
            self._local.clear(parameter)

    # ---------------------------------------------------------------- parts of the stages

    @property
    def _copies(self) -> Group:
        """Ranks that hold the same gradients once these are summed."""
        return self.groups.data

    @property
    def _decayed(self) -> set[str]:
        updated = self._updated()
        return {updated[name].name for name, parameter in self.trained.items() if parameter.ndim > 1}

    def _updated(self) -> dict[str, Any]:
        return self.trained

    def _note_present(self) -> None:
        self._seen.update(name for name, each in self.trained.items() if self._local.exists(each))


class SlicedReplicas(Replicas):
    """Stage 1: each rank of the sharding group updates its slice of every trained parameter.

    The slices are copies: weights take (1 + 1/s) of their size at stages 1 and 2.
    """

    stage = 1

    def __init__(self, model: Any, groups: ProcessGroups, *, master_gradients: bool = False):
        super().__init__(model, groups, master_gradients=master_gradients)
        self._shapes = {name: list(parameter.shape) for name, parameter in self.trained.items()}
        self._slices = {name: self._new_slice(name, parameter) for name, parameter in self.trained.items()}

    def slice_of(self, name: str, whole: Any) -> Any:
        """This rank's slice [n] of a tensor that has a parameter's shape."""
        group = self.groups.sharding
        with no_grad_no_autocast():
            return cut(whole, group.size)[group.position].clone()

    def whole_of(self, name: str, part: Any) -> Any:
        """The tensor, of the parameter's shape, of which the ranks of the sharding group hold slices [n]."""
        with no_grad_no_autocast():
            return join(self.groups.sharding.all_gather(part), self._shapes[name])

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a trained parameter, also while its memory is freed."""
        return tuple(self._shapes[name])

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Takes changes of the parameters over into the slices when it ends."""
        yield
        for name, parameter in self.trained.items():
            paddle.assign(self.slice_of(name, parameter), output=self._slices[name])

    def sum_gradients(self) -> None:
        """Leaves the sums in the slices' gradients; the parameters' own are freed."""
        with no_grad_no_autocast():
            self._reduce(self.trained)
            self._sum_over_replicas()

    def after_update(self) -> None:
        """Puts the updated slices of all ranks together in the parameters."""
        with no_grad_no_autocast():
            names = list(self.trained)
            for bucket in plan_buckets(self.trained.values()):
                members = [names[place] for place in bucket]
                wholes = gather(
                    [self._slices[name] for name in members],
                    [self._shapes[name] for name in members],
                    self.groups.sharding,
                )
                for name, whole in zip(members, wholes, strict=True):
                    paddle.assign(whole, output=self.trained[name])

    @property
    def _copies(self) -> Group:
        return self.groups.replicas

    def _updated(self) -> dict[str, Any]:
        return self._slices

    def _new_slice(self, name: str, parameter: Any) -> Any:
        part = self.slice_of(name, parameter)
        piece = EagerParamBase(shape=part.shape, dtype=part.dtype, name=unique_name.generate(f"{name}@slice"))
        part._share_buffer_to(piece)
        piece.optimize_attr = dict(parameter.optimize_attr)
        piece.regularizer = parameter.regularizer
        return piece

    def _reduce(self, names: Iterable[str]) -> None:
        """Adds the sums over the sharding group to the slices' gradients and frees the parameters' own."""
        names = list(names)
        for bucket in plan_buckets(self.trained[name] for name in names):
            members = [names[place] for place in bucket]
            self._seen.update(name for name in members if self._local.exists(self.trained[name]))
            parts = reduce_scatter(
                [self._local.get(self.trained[name]) for name in members], self.groups.sharding
            )
            for name, part in zip(members, parts, strict=True):
                self._local.clear(self.trained[name])
                piece = self._slices[name]
                if piece.grad is None:
                    piece.grad = part
                else:
                    piece.grad.add_(part)

    def _sum_over_replicas(self) -> None:
        """Sums the slices' gradients over the replicas; they have them of the same parameters."""
        pieces = self._slices.values()
        sum_over([piece.grad for piece in pieces if piece.grad is not None], self.groups.replicas)


class SlicedGradientReplicas(SlicedReplicas):
    """Stage 2: whole gradients live only until the end of their micro-batch."""

    stage = 2

    def after_micro_batch(self) -> None:
        """Sums the micro-batch's gradients over the sharding group into the slices' gradients."""
        with no_grad_no_autocast():
            self._reduce(self.trained)

    def sum_gradients(self) -> None:
        """Sums the slices' gradients over the replicas."""
        with no_grad_no_autocast():
            self._sum_over_replicas()
