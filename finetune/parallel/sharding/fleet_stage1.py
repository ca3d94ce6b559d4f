"""Sharding stage 1, driven by Fleet's `DygraphShardingOptimizer`: each rank updates some parameters, whole.

Fleet deals the parameters out, largest first, always to the rank that has least. A rank keeps the optimizer state of
its own parameters. In a step Fleet reduces every gradient to the owner of its parameter, sums what owners have over the
replicas along the data axis, and broadcasts the updated parameters. A tensor is never cut, so that a checkpoint takes
whole tensors from their owners; the price is that ranks hold as much as Fleet's dealing out gives them, and one
embedding may be a large part of it.

Fleet waits for every reduction. Here it is given a group that only begins its calls (`BegunCalls`): gradients are
handed to it as soon as a bucket of them is complete, and parameters are waited for where the next forward pass needs
them, layer by layer. Fleet's own overlap is not used: it wants each parameter to get a gradient equally often on every
rank, keeps gradients for good, and waits for weights in layers without sublayers only, which LoRA's with dropout are
not.

Fleet's `HybridParallelOptimizer` sums, clips and updates in one call. Here loss, norm, overflow and signals are read in
one piece between the sums and the update (`parallel_model.py`), so that its parts are called by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from paddle import nn
from paddle.distributed import fleet
from paddle.distributed.communication.group import Group as PaddleGroup
from paddle.distributed.communication.reduce import is_avg_reduce_op_supported
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

from finetune.parallel.sharding.flat_slices import no_grad_no_autocast
from finetune.parallel.sharding.gradient_buckets import GradientBuckets
from finetune.parallel.sharding.layer_units import divide
from finetune.parallel.sharding.owners import deal_out
from finetune.parallel.sharding.replicas import DEFAULTS, ReplicaOptions, Replicas
from finetune.parallel.sharding.whole_state import StateTensor, collect_from_owners

if TYPE_CHECKING:
    from finetune.processes.groups import ProcessGroups


class OwnedReplicas(Replicas):
    """Stage 1: each rank of the sharding group updates the parameters that it owns."""

    stage = 1

    def __init__(self, model: Any, groups: ProcessGroups, options: ReplicaOptions = DEFAULTS):
        super().__init__(model, groups, options)
        sizes = {name: int(parameter.size) for name, parameter in self.trained.items()}
        self._owners = deal_out(sizes, groups.sharding.size, options.shared)
        self._owned = {
            name: parameter
            for name, parameter in self.trained.items()
            if self._owners[name] == groups.sharding.position
        }
        self._optimizer: Any = None
        self._calls = BegunCalls(groups.sharding.handle)
        self.buckets = GradientBuckets(self.trained, self._local, self, overlaps=options.overlaps)
        frame, units = divide(model, options.layers)
        order = {name: None for unit in (frame, *units) for name in unit if name in self.trained}
        self._in_forward_order = [self.trained[name] for name in order]
        for module, unit in zip((model, *options.layers), (frame, *units), strict=True):
            module.register_forward_pre_hook(lambda *_, unit=unit: self._calls.wait(unit.values()))

    def engine(self, axis: str) -> str:
        """Fleet's class or function for the axis."""
        return f"fleet {(DygraphShardingOptimizer if axis == 'sharding' else fused_allreduce_gradients).__name__}"

    def optimizer_parameters(self) -> list[Any]:
        """All trained parameters: Fleet's optimizer takes this rank's out of them."""
        return list(self.trained.values())

    def distribute(self, optimizer: Any) -> Any:
        """Hands an optimizer to Fleet's, once."""
        if optimizer is self._optimizer:
            return optimizer
        _set_strategy(averages="disable_stage1_reduce_avg" not in self._options.sharding_words)
        ranks = {parameter.name: self._owners[name] for name, parameter in self.trained.items()}
        topology, group = copy(fleet.get_hybrid_communicate_group()), self._calls.handle
        topology.get_sharding_parallel_group = lambda: group
        self._optimizer = OwnedParametersOptimizer(optimizer, topology, ranks)
        # Has it begin broadcasts in the order in which a forward pass needs them, and put hooks on nothing.
        self._optimizer._broadcast_order_params = self._in_forward_order
        self._optimizer._broadcast_overlap, self._optimizer._layers = True, nn.Layer()
        return self._optimizer

    def collect_state(self, state: Mapping[str, Any]) -> dict[str, StateTensor]:
        """Optimizer state of all ranks, which the first rank of the sharding group can read."""
        return collect_from_owners(state, self.groups.sharding)

    def share_updated(self) -> None:
        """Broadcasts every parameter from its owner."""
        with no_grad_no_autocast():
            for name, parameter in self.trained.items():
                self.groups.sharding.broadcast(parameter, self._owners[name])

    def finish_updates(self) -> None:
        """Returns when the parameters hold what their owners made of them."""
        self._calls.wait()

    def begin(self, names: Sequence[str], gradients: Sequence[Any]) -> None:
        """Has Fleet begin to reduce gradients to the owners of their parameters."""
        parameters = [self.trained[name] for name in names]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # New memory: a backward pass may use a gradient's elsewhere still, and Fleet writes into it.
            setattr(parameter, self._local.attribute, gradient.clone().reshape(parameter.shape))
        self._optimizer.reduce_gradients(parameters, self._optimizer._hcg)
        if not self._options.overlaps:
            self._calls.wait()

    def finish(self) -> None:
        """Leaves the sums in the gradients of the owned parameters; those of the others are worth nothing then."""
        self._calls.wait()
        if self.groups.replicas.size > 1:
            fused_allreduce_gradients(list(self._owned.values()), self._optimizer._hcg)
        for parameter in self.trained.values():
            self._local.hand_over(parameter)
        # Fleet leaves the mean over the ranks. A loss is divided by the label tokens of the global batch already.
        self.scale_gradients(self.groups.data.size)

    def after_update(self) -> None:
        """Fleet's step has begun to broadcast the parameters."""
        if not self._options.overlaps:
            self.finish_updates()

    def _updated(self) -> dict[str, Any]:
        return self._owned


class BegunCalls:
    """In the place of a process group: its calls begin, whoever makes them, and are waited for here.

    Args:
        handle: Paddle's group.
    """

    def __init__(self, handle: Any):
        self._handle = handle
        # By the id of the tensor, which is kept as long as its call is under way.
        self._begun: dict[int, tuple[Any, Any]] = {}

    @property
    def handle(self) -> Any:
        """Paddle's group with these calls."""
        return PaddleGroup(self._handle.rank, self._handle.id, self._handle.ranks, self, self._handle.name)

    def rank(self) -> int:
        """This process's place in the group."""
        return int(self._handle.rank)

    def reduce(self, tensor: Any, dst: int, op: Any, _waits: bool) -> Any:
        """Begins to reduce a tensor to the rank at position `dst`."""
        return self._begin(tensor, self._handle.process_group.reduce(tensor, dst, op, False))

    def broadcast(self, tensor: Any, src: int, _waits: bool) -> Any:
        """Begins to set a tensor to what the rank at position `src` holds."""
        return self._begin(tensor, self._handle.process_group.broadcast(tensor, src, False))

    def wait(self, tensors: Iterable[Any] | None = None) -> None:
        """Returns when the calls that have begun are over; those of some tensors only, if these are given."""
        keys = list(self._begun) if tensors is None else [id(tensor) for tensor in tensors]
        for key in keys:
            if key in self._begun:
                with no_grad_no_autocast():
                    self._begun.pop(key)[1].wait()

    def _begin(self, tensor: Any, task: Any) -> Any:
        self._begun[id(tensor)] = tensor, task
        return SimpleNamespace(wait=lambda: None)  # for Fleet, which waits at once


class OwnedParametersOptimizer(DygraphShardingOptimizer):  # type: ignore[misc]
    """Fleet's stage 1 with owners that are known beforehand.

    Args:
        optimizer: Of all trained parameters; it goes on with those of this rank.
        topology: Fleet's, with a sharding group whose calls somebody else waits for.
        ranks: Paddle's name of a parameter -> position of its owner in the sharding group.
    """

    def __init__(self, optimizer: Any, topology: Any, ranks: Mapping[str, int]):
        self._ranks = ranks
        spare = optimizer._parameter_list[0]
        super().__init__(optimizer, topology)
        # Paddle's optimizers look at their first parameter; on a rank that owns none Fleet updates nothing.
        if not self._inner_opt._parameter_list:
            self._set_inner_opt_attr("_parameter_list", [spare])
            self._set_inner_opt_attr("_param_groups", [spare])

    def _partition_parameters(self) -> dict[int, list[Any]]:
        parts: dict[int, list[Any]] = {rank: [] for rank in range(self._sharding_world_size)}
        for parameter in self._parameter_list:
            parts[self._ranks.get(parameter.name, 0)].append(parameter)
        return parts


def _set_strategy(*, averages: bool) -> None:
    """Tells Fleet's optimizer, which looks at the strategy of `fleet.init`, how to work.

    Args:
        averages: Whether NCCL takes the mean, where it can; else gradients are divided before they are summed.
    """
    configs = fleet.fleet._user_defined_strategy.hybrid_configs["sharding_configs"]
    configs.use_reduce_avg = averages and is_avg_reduce_op_supported()
