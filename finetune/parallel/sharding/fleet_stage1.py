"""Sharding stage 1, driven by Fleet's `DygraphShardingOptimizer`: each rank updates some parameters, whole.

Fleet deals the parameters out, largest first, always to the rank that has least. A rank keeps the optimizer state of
its own parameters. In a step Fleet reduces every gradient to the owner of its parameter, sums what owners have over the
replicas along the data axis, and broadcasts the updated parameters. A tensor is never cut, so that a checkpoint takes
whole tensors from their owners; the price is that ranks hold as much as Fleet's dealing out gives them, and one
embedding may be a large part of it.

Fleet's `HybridParallelOptimizer` sums, clips and updates in one call. Here loss, norm, overflow and signals are read in
one piece between the sums and the update (`parallel_model.py`), so that its parts are called by themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from paddle.distributed import fleet
from paddle.distributed.communication.reduce import is_avg_reduce_op_supported
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

from finetune.parallel.sharding.flat_slices import no_grad_no_autocast
from finetune.parallel.sharding.owners import deal_out
from finetune.parallel.sharding.replicas import Replicas
from finetune.parallel.sharding.whole_state import StateTensor, collect_from_owners

if TYPE_CHECKING:
    from finetune.processes.groups import Group, ProcessGroups


class OwnedReplicas(Replicas):
    """Stage 1: each rank of the sharding group updates the parameters that it owns.

    Args:
        model: The Layer whose forward is called.
        groups: The process groups.
        master_gradients: Whether gradients are added up in float32 whatever the parameters' dtype.
        shared: Names of trained parameters that several stages of a pipeline hold.
        words: Of the setting `sharding_parallel_config`.
    """

    stage = 1

    def __init__(
        self,
        model: Any,
        groups: ProcessGroups,
        *,
        master_gradients: bool = False,
        shared: Collection[str] = (),
        words: Collection[str] = (),
    ):
        super().__init__(model, groups, master_gradients=master_gradients)
        sizes = {name: int(parameter.size) for name, parameter in self.trained.items()}
        self._owners = deal_out(sizes, groups.sharding.size, shared)
        self._owned = {
            name: parameter
            for name, parameter in self.trained.items()
            if self._owners[name] == groups.sharding.position
        }
        self._averages = "disable_stage1_reduce_avg" not in words
        self._optimizer: Any = None

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
        _set_strategy(averages=self._averages)
        ranks = {parameter.name: self._owners[name] for name, parameter in self.trained.items()}
        self._optimizer = OwnedParametersOptimizer(optimizer, fleet.get_hybrid_communicate_group(), ranks)
        return self._optimizer

    def collect_state(self, state: Mapping[str, Any]) -> dict[str, StateTensor]:
        """Optimizer state of all ranks, which the first rank of the sharding group can read."""
        return collect_from_owners(state, self.groups.sharding)

    def share_updated(self) -> None:
        """Broadcasts every parameter from its owner."""
        with no_grad_no_autocast():
            for name, parameter in self.trained.items():
                self.groups.sharding.broadcast(parameter, self._owners[name])

    def after_update(self) -> None:
        """Nothing to do: Fleet's step has broadcast the parameters."""

    def sum_gradients(self) -> None:
        """Leaves the sums in the gradients of the owned parameters; those of the others are worth nothing then."""
        with no_grad_no_autocast():
            self._note_present()
            # Where Fleet has to make a gradient itself, what the others send gets lost in a copy.
            for parameter in self.trained.values():
                self._local.fill(parameter)
            topology = self._optimizer._hcg
            self._optimizer.reduce_gradients(list(self.trained.values()), topology)
            if self.groups.replicas.size > 1:
                fused_allreduce_gradients(list(self._owned.values()), topology)
            for parameter in self.trained.values():
                self._local.hand_over(parameter)
            # Fleet leaves the mean over the ranks. A loss is divided by the label tokens of the global batch already.
            self.scale_gradients(self.groups.data.size)

    def drop_absent(self, presence: Sequence[float]) -> None:
        """Takes away gradients which no replica has, on all ranks: neither an update nor a broadcast follows."""
        for parameter, flag in zip(self.trained.values(), presence, strict=True):
            if not flag:
                parameter.clear_gradient(False)

    def clear_gradients(self) -> None:
        """Frees all gradients."""
        super().clear_gradients()
        for parameter in self.trained.values():
            parameter.clear_gradient(False)

    @property
    def _copies(self) -> Group:
        return self.groups.replicas

    def _updated(self) -> dict[str, Any]:
        return self._owned


class OwnedParametersOptimizer(DygraphShardingOptimizer):  # type: ignore[misc]
    """Fleet's stage 1 with owners that are known beforehand.

    Args:
        optimizer: Of all trained parameters; it goes on with those of this rank.
        topology: Fleet's `HybridCommunicateGroup`.
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

    def _get_param_grad(self, param: Any) -> Any:
        # Fleet looks for a float32 gradient in `main_grad` only; once summed it stands where optimizers look.
        main = getattr(param, "main_grad", None)
        return param._grad_ivar() if main is None else main


def _set_strategy(*, averages: bool) -> None:
    """Tells Fleet's optimizer, which looks at the strategy of `fleet.init`, how to work.

    Args:
        averages: Whether NCCL takes the mean, where it can; else gradients are divided before they are summed.
    """
    configs = fleet.fleet._user_defined_strategy.hybrid_configs["sharding_configs"]
    configs.use_reduce_avg = averages and is_avg_reduce_op_supported()
