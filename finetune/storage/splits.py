"""How a tensor is cut into the parts that tensor-parallel ranks hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.storage.dtypes import Array


@dataclass(frozen=True)
class Split:
    """Division of one tensor over the ranks of a tensor-parallel group.

    Attributes:
        axis: The axis that is cut: 0 or -1.
        blocks: Relative sizes of the blocks that the axis consists of; a rank holds its stretch of each.
        unit: What the degree must divide for the tensor to be cut; otherwise every rank holds all of it.
            None: it is always cut.
    """

    axis: int
    blocks: tuple[int, ...] = (1,)
    unit: int | None = None

    def applies(self, degree: int) -> bool:
        """Whether the ranks hold different parts at this degree."""
        return degree > 1 and (self.unit is None or self.unit % degree == 0)

    def part_shape(self, shape: Sequence[int], degree: int) -> tuple[int, ...]:
        """Shape of a rank's part of a tensor of that shape."""
        sizes = list(shape)
        if self.applies(degree):
            sizes[self.axis] //= degree
        return tuple(sizes)

    def whole_shape(self, shape: Sequence[int], degree: int) -> tuple[int, ...]:
        """Shape of the tensor whose parts have that shape."""
        sizes = list(shape)
        if self.applies(degree):
            sizes[self.axis] *= degree
        return tuple(sizes)

    def places(self, shape: Sequence[int], degree: int, rank: int) -> list[tuple[slice, ...]]:
        """Where a rank's part lies in the whole tensor, one place per block.

        Raises:
            ValueError: The degree does not divide a block.
        """
        ndim, size = len(shape), shape[self.axis]
        if not self.applies(degree):
            return [(slice(None),) * ndim]
        axis, places, begin = self.axis % ndim, [], 0
        for block in self.blocks:
            width, rest = divmod(size * block, sum(self.blocks) * degree)
            if rest:
                raise ValueError(
                    f"degree {degree} does not divide axis {axis} of shape {list(shape)} in blocks {self.blocks}"
                )
            start = begin + rank * width
            place = [slice(None)] * ndim
            place[axis] = slice(start, start + width)
            places.append(tuple(place))
            begin += width * degree
        return places

    def part(self, whole: Array, degree: int, rank: int) -> Array:
        """A rank's part: a view when the axis is one block, a new array of the part's size otherwise."""
        places = self.places(whole.shape, degree, rank)
        if len(places) == 1:
            return whole[places[0]]
        return np.concatenate([whole[place] for place in places], axis=self.axis)

    def whole(self, parts: Sequence[Array]) -> Array:
        """The tensor whose parts are given in the order of the ranks; the inverse of `part`."""
        degree = len(parts)
        if not self.applies(degree):
            return parts[0]
        joined = np.empty(self.whole_shape(parts[0].shape, degree), parts[0].dtype)
        for rank, part in enumerate(parts):
            self.put(joined, part, degree=degree, rank=rank)
        return joined

    def put(self, whole: Array, part: Array, *, degree: int, rank: int) -> None:
        """Writes a rank's part to its place in the whole tensor."""
        begin = 0
        for place in self.places(whole.shape, degree, rank):
            inner = list(place)
            if self.applies(degree):
                axis = self.axis % whole.ndim
                width = place[axis].stop - place[axis].start
                inner[axis] = slice(begin, begin + width)
                begin += width
            whole[place] = part[tuple(inner)]
