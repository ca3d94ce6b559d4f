"""Optimizer state as a checkpoint has it: whole tensors, whoever keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import paddle

from finetune.storage.dtypes import dtype_name

if TYPE_CHECKING:
    from finetune.processes.groups import Group


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the optimizer's, as a checkpoint has it but for tensor parallelism.

    Attributes:
        shape: Of the whole tensor.
        dtype: Paddle's name of its type.
        read: Gives it to the first rank of the sharding group; all ranks of the group must call it.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]


def collect_from_owners(state: Mapping[str, Any], group: Group) -> dict[str, StateTensor]:
    """State of which each tensor is kept, whole, by one rank of a group.

    Args:
        state: What this rank keeps, by its name in the files.
        group: All its ranks must call this.

    Returns:
        The tensors of all ranks; `read` sends one from its owner to the first rank, and gives None to the others.
    """
    own = {name: (tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in state.items()}
    return {
        name: StateTensor(tuple(shape), dtype, _transfer(state.get(name), tuple(shape), dtype, owner, group))
        for owner, kept in enumerate(group.gather_objects(own))
        for name, (shape, dtype) in kept.items()
    }


def _transfer(tensor: Any, shape: tuple[int, ...], dtype: str, owner: int, group: Group) -> Callable[[], Any]:
    def read() -> Any:
        if group.is_first:
            if owner == 0:
                return tensor
            received = paddle.empty(shape, dtype=dtype)
            group.receive(received, source=owner)
            return received
        if group.position == owner:
            group.send(tensor, to=0)
        return None

    return read
