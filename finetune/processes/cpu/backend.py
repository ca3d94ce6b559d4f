"""Stand-ins that let several CPU processes train together, so that any layout can be rehearsed without a GPU.

Paddle's hybrid parallelism was written for GPUs; on CPU a handful of its calls do not exist or cannot work. `install`
replaces those, and only those, in the running process. It must come before `fleet.init`, on every rank; nothing
here is used with a GPU or with one process.
"""

from __future__ import annotations

import os
from typing import Any

from finetune.machine.stand_ins import replace, replace_import

# This process's connections, made with the first group.
_links: Any = None
_installed = False


def is_installed() -> bool:
    """Whether the stand-ins are in place in this process."""
    return _installed


def install(*, timeout_seconds: float = 120) -> None:
    """Puts the stand-ins in place; a second call changes nothing.

    Args:
        timeout_seconds: Longest wait for the other processes while they connect. The wait for a message between
            them is Paddle's own setting (PADDLE_PG_TIMEOUT, in milliseconds; half an hour where it is not set).
    """
    global _installed
    if _installed:
        return
    _installed = True
    # For the choice in `paddle.distributed.init_parallel_env`, which follows the way Paddle was compiled (NCCL)
    # and not the device in use.
    os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
    from paddle.distributed import ParallelEnv

    # For `paddle.distributed.ParallelEnv().device_id`, which Paddle sets only where it was compiled for an
    # accelerator, and which init_parallel_env reads on any device.
    replace(ParallelEnv, "_device_id", 0)
    _replace_store(timeout_seconds)
    _replace_process_groups(timeout_seconds)
    _replace_tensor_parallel_operators()


def _replace_store(timeout_seconds: float) -> None:
    """Stands for `paddle.base.core.create_or_get_global_tcp_store`, which waits for all ranks with the interpreter held.

    No other thread runs meanwhile, so that the watch could not tell that one of them has died. The same store, made by
    its class, waits without.
    """
    from paddle.base import core

    def make_store() -> Any:
        if not stores:
            endpoint = os.environ.get("PADDLE_MASTER") or os.environ["PADDLE_TRAINER_ENDPOINTS"].split(",")[0]
            host, _, port = endpoint.rpartition(":")
            rank, world = int(os.environ["PADDLE_TRAINER_ID"]), int(os.environ["PADDLE_TRAINERS_NUM"])
            stores.append(core.TCPStore(host, int(port), rank == 0, world, int(timeout_seconds)))
        return stores[0]

    stores: list[Any] = []
    replace(core, "create_or_get_global_tcp_store", make_store)


def _replace_process_groups(timeout_seconds: float) -> None:
    """Stands for `paddle.distributed.collective._new_process_group_impl`, which makes a ProcessGroupGloo.

    `process_group` says why that one will not do.
    """
    from paddle.distributed import collective, parallel

    from finetune.processes.cpu.process_group import CpuProcessGroup

    def new_group(ranks: list[int] | None = None, *args: Any, **options: Any) -> Any:
        # The call below is told how many ranks a group has, but not which.
        members.append(
            sorted(ranks) if ranks is not None else list(range(collective._get_global_env().world_size))
        )
        try:
            return original(ranks, *args, **options)
        finally:
            members.pop()

    def new_process_group(
        backend: str, store: Any, rank: int, world_size: int, name: str, *_: Any, group_id: int = 0, **__: Any
    ) -> CpuProcessGroup:
        links = _connect(store, timeout_seconds)
        return CpuProcessGroup(links, members[-1] if members else range(links.world), group_id)

    members: list[list[int]] = []
    original = collective.new_group
    import paddle.distributed as dist

    for module in (dist, collective):
        replace(module, "new_group", new_group)
    for module in (collective, parallel):  # the second one has it by name
        replace(module, "_new_process_group_impl", new_process_group)


def _connect(store: Any, timeout_seconds: float) -> Any:
    """This process's links, made at the first call."""
    global _links
    if _links is None:
        from paddle.distributed import ParallelEnv

        from finetune.processes.cpu.links import Links

        environment = ParallelEnv()
        _links = Links(
            environment.rank,
            environment.trainer_endpoints,
            store,
            timeout_seconds=environment.pg_timeout / 1000,
            connect_seconds=timeout_seconds,
        )
    return _links


def _replace_tensor_parallel_operators() -> None:
    """Puts the operators of `collectives` where Paddle's layers and PaddleNLP's models look for them."""
    import paddle
    from paddle.distributed import collective
    from paddle.distributed.fleet.layers.mpu import mp_ops

    from finetune.processes.cpu import collectives

    operators = {
        "_c_identity": collectives.identity,
        "_mp_allreduce": collectives.all_reduce,
        "_c_concat": collectives.concatenate,
        "_c_split": collectives.split,
        "_c_softmax_with_cross_entropy": collectives.softmax_with_cross_entropy,
    }
    for module in (
        mp_ops,
        collective,
    ):  # the second one carries the first one's functions under the same names
        for name, operator in operators.items():
            replace(module, name, operator)
    # Called by Fleet's linear layer that sums gradients itself; Paddle gives this module another's name.
    replace_import(
        paddle._legacy_C_ops,
        "c_identity",
        lambda tensor, *_: tensor.clone(),
        source="paddle._legacy_C_ops.c_identity",
    )
