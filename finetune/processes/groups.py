"""Process groups of a layout, behind the few collective calls that the project makes.

A group of one rank costs nothing: its calls return at once, so code that uses groups reads the same for one
process and for many. Fleet makes the groups that PaddleNLP's tensor-parallel layers look for; the ones that it
lacks are made here, on all ranks in the same order.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import RunError
from finetune.machine.stand_ins import replace
from finetune.processes.layout import Coordinates, Layout
from finetune.processes.network.plain_values import decode_value, encode_value
from finetune.processes.time_limit import time_limit

_CONNECT_SECONDS = 120.0
_IS_OF_NETWORK = re.compile(r"TCP|[Ss]ocket|[Cc]onnection")
"""How Paddle's store and NCCL say that somebody is gone; they raise ValueError and RuntimeError."""

# Paddle's TP layers are filled with the model's own weights afterwards, so any seed will do; left alone, Fleet would
# draw one from NumPy's global state and seed Paddle's with it.
_TENSOR_INIT_SEED = 1

_TENSOR_WORDS = {
    "enable_mp_async_allreduce": "mp_async_allreduce",
    "enable_mp_skip_c_identity": "mp_skip_c_identity",
    "enable_sp_async_reduce_scatter": "sp_async_reduce_scatter",
}
"""Words of `tensor_parallel_config` to the fields of Fleet's strategy that its layers look at when they are made."""

_ONE_PROCESS = Layout()


@dataclass(frozen=True)
class Group:
    """Ranks that communicate.

    Attributes:
        ranks: Their global ranks, in the group's order.
        position: This process's place among them.
        handle: Paddle's group; None when there is only one rank.
    """

    ranks: tuple[int, ...] = (0,)
    position: int = 0
    handle: Any = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        """Whether this process is the group's first."""
        return self.position == 0

    def all_reduce(self, tensor: Any, op: str = "sum") -> None:
        """Reduces a tensor of any shape in place, to the same value on every rank; op "sum", "max" or "min"."""
        if self.size > 1:
            import paddle.distributed as dist

            dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op.upper()), group=self.handle)

    def begin_all_reduce(self, tensor: Any) -> Any:
        """Begins to sum a tensor in place; it must be left alone until `wait()` of the result returns."""
        import paddle.distributed as dist

        return dist.all_reduce(tensor, group=self.handle, sync_op=False)

    def all_reduce_numbers(self, values: Sequence[float], op: str = "sum") -> list[float]:
        """Reduces a few numbers in float64."""
        if self.size == 1:
            return list(values)
        import paddle

        tensor = paddle.to_tensor(list(values), dtype="float64")
        self.all_reduce(tensor, op)
        return [float(value) for value in tensor.tolist()]

    def broadcast(self, tensor: Any, source: int = 0) -> None:
        """Sets a tensor, in place, to what the rank at position `source` holds."""
        if self.size > 1:
            import paddle.distributed as dist

            dist.broadcast(tensor, src=self.ranks[source], group=self.handle)

    def all_gather(self, tensor: Any) -> list[Any]:
        """The tensors of all ranks, of one shape and dtype, in the group's order."""
        if self.size == 1:
            return [tensor]
        import paddle.distributed as dist

        parts: list[Any] = []
        dist.all_gather(parts, tensor.contiguous(), group=self.handle)
        return parts

    def begin_all_gather(self, output: Any, tensor: Any) -> Any:
        """Begins to fill `output` [size * n] with all ranks' `tensor` [n].

        Both must be left alone until `wait()` of the result returns.
        """
        import paddle.distributed as dist

        return dist.stream.all_gather(output, tensor, group=self.handle, sync_op=False)

    def begin_reduce_scatter(self, output: Any, source: Any) -> Any:
        """Begins to set `output` [n] to this rank's part of the sum of all ranks' `source` [size * n].

        Both must be left alone until `wait()` of the result returns.
        """
        import paddle.distributed as dist

        return dist.reduce_scatter(output, source, group=self.handle, sync_op=False)

    def send(self, tensor: Any, to: int) -> None:
        """Sends to the rank at a position; returns when the tensor may be changed again."""
        import paddle.distributed as dist

        dist.send(tensor.contiguous(), dst=self.ranks[to], group=self.handle)

    def receive(self, tensor: Any, source: int) -> None:
        """Fills a tensor with what the rank at a position sends."""
        import paddle.distributed as dist

        dist.recv(tensor, src=self.ranks[source], group=self.handle)

    def begin_send(self, tensor: Any, to: int) -> Any:
        """Begins to send a contiguous tensor, which must be kept unchanged until `wait()` of the result returns."""
        import paddle.distributed as dist

        return dist.isend(tensor, dst=self.ranks[to], group=self.handle)

    def begin_receive(self, tensor: Any, source: int) -> Any:
        """Begins to fill a tensor, which holds what was sent when `wait()` of the result returns."""
        import paddle.distributed as dist

        return dist.irecv(tensor, src=self.ranks[source], group=self.handle)

    def gather_objects(self, value: Any) -> list[Any]:
        """Small plain values (None, numbers, texts, lists, tuples, dicts, paths) of all ranks, in the group's order.

        Raises:
            TypeError: The value is something else; nothing was sent then.
        """
        if self.size == 1:
            return [value]
        import numpy as np
        import paddle

        data = encode_value(value)
        sizes = [int(size.item()) for size in self.all_gather(paddle.to_tensor([len(data)], dtype="int64"))]
        padded = np.zeros(max(sizes), dtype="uint8")
        padded[: len(data)] = np.frombuffer(data, dtype="uint8")
        parts = self.all_gather(paddle.to_tensor(padded))
        return [decode_value(part.numpy()[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            import paddle

            arrived = paddle.zeros([1], dtype="int32")
            self.all_reduce(arrived)
            arrived.numpy()  # on a GPU the call above returns before it is done


@dataclass(frozen=True)
class ProcessGroups:
    """All groups that this process belongs to.

    Attributes:
        layout: The degrees.
        rank: This process's global rank.
        world: All ranks.
        tensor: Ranks that hold slices of the same layers.
        pipeline: Ranks that hold the stages of one model.
        sharding: Replicas that share out the optimizer state.
        replicas: Replicas along the data axis only.
        data: All ranks that hold the same weights and take different samples (replicas x sharding).
        model: All ranks that together hold one model (pipeline x tensor).
        ends: The first and the last stage of this rank's pipeline, for a rank on one of them.
    """

    layout: Layout = _ONE_PROCESS
    rank: int = 0
    world: Group = Group()
    tensor: Group = Group()
    pipeline: Group = Group()
    sharding: Group = Group()
    replicas: Group = Group()
    data: Group = Group()
    model: Group = Group()
    ends: Group = Group()

    @property
    def coordinates(self) -> Coordinates:
        """This process's place."""
        return self.layout.coordinates(self.rank)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0


def start_groups(
    layout: Layout,
    *,
    device: str,
    tensor_words: Collection[str] = (),
    timeout_seconds: float = _CONNECT_SECONDS,
) -> ProcessGroups:
    """Connects the processes of a run and makes its groups; must be called on every rank.

    Args:
        layout: The degrees; their product is the number of processes.
        device: "cpu" or a GPU's name; on CPU the calls that have GPU kernels only are stood in for.
        tensor_words: Of the setting `tensor_parallel_config`, for Fleet's tensor-parallel layers.
        timeout_seconds: Longest wait for the making of the groups; the process ends with code 1 beyond it.
    """
    if layout.world == 1:
        return ProcessGroups()
    _refuse_pickles()
    if device.startswith("cpu"):
        from finetune.processes.cpu.backend import install

        install(timeout_seconds=timeout_seconds)
    with time_limit(timeout_seconds, "connecting the processes and making their groups"):
        try:
            return _make_groups(layout, tensor_words)
        except (ValueError, RuntimeError) as error:
            if not _IS_OF_NETWORK.search(str(error)):
                raise
            reason = str(error).strip().splitlines()[-1]
            raise RunError(
                f"the processes of the run could not be connected ({reason}): another one ended or cannot be reached, "
                "its own log says why"
            ) from error


def _refuse_pickles() -> None:
    """Has Paddle's calls that hand objects from rank to rank refuse what arrives: it would be unpickled.

    Ours are `Group.gather_objects`; nothing that a run calls in Paddle or PaddleNLP needs theirs.
    """

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            "an object from another process is not unpickled: use Group.gather_objects instead"
        )

    for name in (
        *(f"communication.{name}" for name in ("serialization_utils", "all_gather", "broadcast", "recv", "scatter")),
        "fleet.meta_parallel.pp_utils.p2p_communication",
    ):  # fmt: skip
        module = importlib.import_module(f"paddle.distributed.{name}")
        replace(module, "convert_tensor_to_object", refuse)


def _make_groups(layout: Layout, tensor_words: Collection[str]) -> ProcessGroups:
    """Fleet's groups for the four axes, and the three that it lacks."""
    import paddle.distributed as dist
    from paddle.distributed import fleet

    strategy = fleet.DistributedStrategy()
    strategy.tensor_parallel_configs = {"tensor_init_seed": _TENSOR_INIT_SEED}
    strategy.hybrid_configs = {
        "dp_degree": layout.data,
        "mp_degree": layout.tensor,
        "pp_degree": layout.pipeline,
        "sharding_degree": layout.sharding,
        "order": ["dp", "pp", "sharding", "sep", "mp"],
        "mp_configs": {field: word in tensor_words for word, field in _TENSOR_WORDS.items()},
    }
    fleet.init(is_collective=True, strategy=strategy, log_level="ERROR")
    hybrid, rank = fleet.get_hybrid_communicate_group(), dist.get_rank()

    def fleets(handle: Any) -> Group:
        ranks = tuple(handle.ranks)
        return Group(ranks, ranks.index(rank), handle) if len(ranks) > 1 else Group((rank,))

    return ProcessGroups(
        layout=layout,
        rank=rank,
        world=Group(tuple(range(layout.world)), rank, dist.get_group(0)),
        tensor=fleets(hybrid.get_model_parallel_group()),
        pipeline=fleets(hybrid.get_pipe_parallel_group()),
        sharding=fleets(hybrid.get_sharding_parallel_group()),
        replicas=fleets(hybrid.get_data_parallel_group()),
        data=_new_group(rank, _members(layout, same=("pipeline", "tensor"))),
        model=_new_group(rank, _members(layout, same=("data", "sharding"))),
        ends=_new_group(
            rank, [_ends(ranks) for ranks in _members(layout, same=("data", "sharding", "tensor"))]
        ),
    )


def _members(layout: Layout, *, same: Sequence[str]) -> list[list[int]]:
    """All ranks, in groups of those that agree on the axes `same`."""
    members: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world):
        place = layout.coordinates(rank)
        members.setdefault(tuple(getattr(place, axis) for axis in same), []).append(rank)
    return list(members.values())


def _ends(pipeline: list[int]) -> list[int]:
    """The ranks of the first and the last stage."""
    return sorted({pipeline[0], pipeline[-1]})


def _new_group(rank: int, members: list[list[int]]) -> Group:
    """This rank's group among several; every rank makes all of them, in order."""
    import paddle.distributed as dist

    mine = Group((rank,))
    for ranks in members:
        if len(ranks) == 1:
            continue
        handle = dist.get_group(0) if len(ranks) == dist.get_world_size() else dist.new_group(ranks)
        if rank in ranks:
            mine = Group(tuple(ranks), ranks.index(rank), handle)
    return mine
