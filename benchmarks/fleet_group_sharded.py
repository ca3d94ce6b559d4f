"""Fleet's sharding stages 2 and 3 on a CPU, to be measured and tried.

`GroupShardedStage2` and `GroupShardedStage3` are made for accelerators. What they look for and a CPU lacks is stood in
for here: a device with a number, copies between host and device, the size to which memory is aligned. Everything else
is theirs. Runs use the project's own stages 2 and 3; docs/parallel.md tells why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import paddle
from paddle.base import core
from paddle.distributed.fleet.meta_parallel.sharding import (
    group_sharded_optimizer_stage2,
    group_sharded_stage3,
    group_sharded_storage,
)
from paddle.distributed.fleet.meta_parallel.sharding.group_sharded_stage2 import GroupShardedStage2

ALIGNED_BYTES = 4


@contextmanager
def _replaced(values: Mapping[tuple[Any, str], Any]) -> Iterator[None]:
    kept = {place: getattr(*place) for place in values}
    try:
        for place, value in values.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in kept.items():
            setattr(*place, value)


def cpu_as_accelerator() -> AbstractContextManager[None]:
    """Within it Fleet's classes can be made and used on a CPU."""
    set_device, modules = paddle.set_device, (group_sharded_optimizer_stage2, group_sharded_stage3)
    replaced: dict[tuple[Any, str], Any] = {
        (paddle, "get_device"): lambda: "cpu:0",
        (paddle.device, "get_device"): lambda: "cpu:0",
        (paddle, "set_device"): lambda name: set_device(name.split(":")[0]),
        (group_sharded_storage, "cvt_to_device"): lambda tensor, *_, **__: tensor,
        (paddle.Tensor, "cpu"): lambda tensor, *_: tensor.detach().clone(),  # else it is the same memory
        **{(module, "alignment"): {"cpu": ALIGNED_BYTES} for module in modules},
    }
    return _replaced(replaced)


def _compiled_for_gpus() -> AbstractContextManager[None]:
    """Within it Fleet's classes let themselves be made."""
    return _replaced({(core, "is_compiled_with_cuda"): lambda: True})


def wrap_stage_2(
    model: Any, optimizer: Any, group: Any, *, buffer_elements: int = 2**23, overlaps: bool = False
) -> tuple[Any, Any]:
    """The model and the optimizer of Fleet's stage 2; within `cpu_as_accelerator`.

    Args:
        model: Whose trained parameters the optimizer has.
        optimizer: AdamW.
        group: Paddle's group.
        buffer_elements: Gradients of up to so many elements are reduced together, all of a rank's in one piece.
        overlaps: Whether gradients are reduced, and parameters broadcast, while ranks compute.
    """
    with _compiled_for_gpus():
        optimizer = group_sharded_optimizer_stage2.GroupShardedOptimizerStage2(
            optimizer._parameter_list, optimizer, group=group, device="cpu", pretrain_sync_models=False
        )
    wrapped = GroupShardedStage2(model, optimizer, group=group, device="cpu", buffer_max_size=buffer_elements)
    wrapped._set_reduce_overlap(overlaps)
    if overlaps:
        optimizer._set_broadcast_overlap(True, model)
    return wrapped, optimizer


def wrap_stage_3(model: Any, optimizer: Any, group: Any, *, whole_elements: int = 2**20) -> tuple[Any, Any]:
    """The model and the optimizer of Fleet's stage 3; within `cpu_as_accelerator`.

    Args:
        model: All its parameters are sliced.
        optimizer: AdamW.
        group: Paddle's group.
        whole_elements: Up to so many elements, a parameter stays whole.
    """
    with _compiled_for_gpus():
        wrapped = group_sharded_stage3.GroupShardedStage3(
            model,
            optimizer,
            group=group,
            device="cpu",
            segment_size=whole_elements,
            pretrain_sync_models=False,
        )
    return wrapped, wrapped._optim
