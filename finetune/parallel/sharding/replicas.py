"""The data axis: gradient sums over replicas, and the sharding stages that share out what replicas would repeat.

Replicas hold the same weights and take different samples. Gradients are sums over samples (the loss is divided by the
number of label tokens of the whole global batch beforehand), so the gradient of a step is their plain sum over all
replicas. ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) spares memory among the s ranks of the sharding group:

    stage 0   every rank holds all weights, gradients and optimizer state (`bucketed_replicas.py`)
    stage 1   each rank updates about 1/s of the parameters: optimizer state / s. Fleet gives whole parameters to ranks
              (`fleet_stage1.py`), or ranks have slices of every parameter (`sliced_replicas.py`)
    stage 2   gradients are summed after every micro-batch, each rank keeps 1/s: gradients / s between micro-batches
              (`sliced_replicas.py`)
    stage 3   weights too are kept as slices and gathered layer by layer (`gathered_layers.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import paddle

from finetune.families.tensor_splits import is_scalar, tensor_of
from finetune.models.layers import named_weights
from finetune.parallel.sharding.flat_slices import no_grad_no_autocast
from finetune.parallel.sharding.local_gradients import MasterGradients, ParameterGradients
from finetune.parallel.sharding.whole_state import StateTensor
from finetune.storage.dtypes import dtype_name

if TYPE_CHECKING:
    from finetune.parallel.sharding.gradient_buckets import GradientBuckets
    from finetune.processes.groups import Group, ProcessGroups


@dataclass(frozen=True)
class ReplicaOptions:
    """How replicas work together.

    Attributes:
        layers: Decoder layers of the model, whose weights come and go one layer after the other; the first tensor that
            they are given is the hidden states.
        master_gradients: Whether gradients are added up in float32 whatever the parameters' dtype.
        overlaps: Whether ranks exchange gradients and weights while they compute, where the engine can; the bits are
            the same either way.
        sharding_words: Of the setting `sharding_parallel_config`; some give each rank a slice of every parameter at
            stage 1, in the place of whole parameters.
        shared: Names of weights that several stages of a pipeline hold.
        num_parts: Parts of the model on this rank (virtual stages), each of which has backward passes of its own.
    """

    layers: Sequence[Any] = ()
    master_gradients: bool = False
    overlaps: bool = True
    sharding_words: Collection[str] = ()
    shared: Collection[str] = ()
    num_parts: int = 1


DEFAULTS = ReplicaOptions()


class Replicas:
    """A single replica, and the interface of all stages.

    A step is: `begin_step`; for each micro-batch forward, backward and `after_micro_batch`; then `sum_gradients`, `squared_norm`
    for clipping, `drop_absent` and `scale_gradients`, the optimizer's step, `after_update`, `clear_gradients`. All ranks run
    equally many micro-batches, some of which may weigh nothing.

    Args:
        model: The Layer whose forward is called; which parameters are trained is final from here on.
        groups: The process groups.
        options: How replicas work together.

    Attributes:
        stage: The sharding stage.
        trained: Trained parameters by structured name.
        buckets: What begins the sums of gradients, if anything.
    """

    stage = 0
    buckets: GradientBuckets | None = None

    def __init__(self, model: Any, groups: ProcessGroups, options: ReplicaOptions = DEFAULTS):
        self.groups, self._options = groups, options
        self.trained = {
            name: parameter for name, parameter in named_weights(model).items() if not parameter.stop_gradient
        }
        values = self.trained.values()
        self._local = MasterGradients(values) if options.master_gradients else ParameterGradients()
        self._shapes = {name: list(parameter.shape) for name, parameter in self.trained.items()}
        self._seen: set[str] = set()

    def engine(self, axis: str) -> str:
        """What drives the axis "data" or "sharding", as "package name"."""
        return f"finetune {type(self).__name__}"

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

    def distribute(self, optimizer: Any) -> Any:
        """The optimizer to step with, made from one of `optimizer_parameters`."""
        return optimizer

    def collect_state(self, state: Mapping[str, Any]) -> dict[str, StateTensor]:
        """Optimizer state as checkpoints have it; all ranks of the sharding group must call this.

        Args:
            state: What this rank keeps, by `<parameter>/<accumulator>`.
        """
        return {key: self._state_tensor(key, tensor) for key, tensor in state.items()}

    def _state_tensor(self, key: str, tensor: Any) -> StateTensor:
        dtype = dtype_name(tensor.dtype)
        if is_scalar(key):
            return StateTensor(tuple(tensor.shape), dtype, lambda: tensor)
        name = tensor_of(key)
        return StateTensor(self.whole_shape(name), dtype, lambda: self.whole_of(name, tensor))

    def slice_of(self, name: str, whole: Any) -> Any:
        """What this rank updates out of a tensor that has a parameter's shape, say a moment."""
        return whole

    def whole_of(self, name: str, part: Any) -> Any:
        """The whole tensor of which the ranks of the sharding group hold slices; all must call it."""
        return part

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a trained parameter, also while its memory is freed."""
        return tuple(self._shapes[name])

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Within it the model's parameters are whole, to be read or changed; all ranks must enter."""
        self.finish_updates()
        yield

    def share_updated(self) -> None:
        """Puts into the parameters what the ranks of the sharding group changed in what they update."""
        self.after_update()
        self.finish_updates()

    def finish_updates(self) -> None:
        """Returns when the parameters may be read elsewhere than in the model's forward pass."""

    # ---------------------------------------------------------------- in a step

    def begin_step(self, num_micro_batches: int) -> None:
        """To be called before the first forward pass of a step.

        Args:
            num_micro_batches: Of this rank, as many as on all others.
        """
        if self.buckets:
            self.buckets.begin_step(num_micro_batches)

    def after_micro_batch(self) -> None:
        """To be called when a micro-batch's backward is done, that of each part of the model by itself."""

    def sum_gradients(self) -> None:
        """Sums the gradients over all replicas; a rank without one counts as zero.

        Which parameters have a gradient on some replica is found out later (`presence`), so that nothing waits for it:
        with several replicas all have one until `drop_absent`.
        """
        self.finish_updates()
        if self.buckets:
            self._seen |= self.buckets.finish()
            return
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
            if not flag and name in updated:
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
        for tensor in (*self._updated().values(), *self.trained.values()):
            tensor.clear_gradient(False)
        for parameter in self.trained.values():
            self._local.clear(parameter)

    # ---------------------------------------------------------------- parts of the stages

    @property
    def _copies(self) -> Group:
        """Ranks that hold the same gradients once these are summed."""
        return self.groups.replicas if self.stage else self.groups.data

    @cached_property
    def _decayed(self) -> set[str]:
        return {tensor.name for name, tensor in self._updated().items() if self.trained[name].ndim > 1}

    def _updated(self) -> dict[str, Any]:
        return self.trained

    def _note_present(self) -> None:
        self._seen.update(name for name, each in self.trained.items() if self._local.exists(each))
