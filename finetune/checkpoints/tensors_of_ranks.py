"""Tensors as a rank holds them: whole, or a part of what tensor-parallel ranks hold together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.families.family import Family, find_family
from finetune.families.tensor_splits import find_split
from finetune.processes.groups import Group
from finetune.storage.dtypes import Array, array_dtype, dtype_name, num_bytes
from finetune.storage.splits import Split


@dataclass(frozen=True)
class LocalTensor:
    """A tensor as this rank holds it.

    Attributes:
        shape: Of this tensor-parallel rank's part.
        dtype: Paddle's name of its type.
        read: Gives it; may communicate within the sharding group.
        split: How it is divided over tensor-parallel ranks; None when all hold it whole.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]
    split: Split | None = None

    def whole_shape(self, degree: int) -> tuple[int, ...]:
        """Shape of the tensor of which this many tensor-parallel ranks hold parts."""
        return self.split.whole_shape(self.shape, degree) if self.split else self.shape

    def whole_bytes(self, degree: int) -> int:
        """Size of that tensor."""
        return num_bytes(self.dtype, self.whole_shape(degree))


def family_of(config: Any) -> Family:
    """The family of a PaddleNLP config object."""
    return find_family(config.to_dict())


def find_local_split(name: str, config: Any, family: Family | None = None) -> Split | None:
    """How a parameter, or optimizer state called `<parameter>/<accumulator>`, is divided in a model.

    Args:
        name: The tensor.
        config: The model's PaddleNLP config, with its tensor-parallel degree.
        family: Its family, where it is known.
    """
    degree = config.tensor_parallel_degree
    return find_split(family or family_of(config), name, config, degree=degree) if degree > 1 else None


def local_tensor(name: str, tensor: Any, config: Any, family: Family | None = None) -> LocalTensor:
    """A tensor of the model as it stands."""
    return LocalTensor(
        tuple(tensor.shape), dtype_name(tensor.dtype), lambda: tensor, find_local_split(name, config, family)
    )


def gather_whole(value: Any, tensor: LocalTensor, group: Group) -> Array | None:
    """The whole tensor on the first rank of a tensor-parallel group, None on the others; bfloat16 as uint16."""
    if group.size == 1 or tensor.split is None:
        return value.numpy() if group.is_first else None
    if not group.is_first:
        if value.size:
            group.send(_as_bytes(value), to=0)
        return None
    import paddle

    whole = np.empty(tensor.split.whole_shape(tensor.shape, group.size), array_dtype(tensor.dtype))
    tensor.split.put(whole, value.numpy(), degree=group.size, rank=0)
    for rank in range(1, group.size):
        if not value.size:
            break
        part = paddle.empty([value.size * value.element_size()], dtype="uint8")
        group.receive(part, source=rank)
        array = part.numpy().view(whole.dtype).reshape(tensor.shape)
        tensor.split.put(whole, array, degree=group.size, rank=rank)
    return whole


def _as_bytes(value: Any) -> Any:
    """A tensor's bytes [n]: a type that every backend sends, and no rounding on the way."""
    return value.detach().contiguous().flatten().view("uint8")
