"""A tensor that lies whole in one file, or in as many parts as there are tensor-parallel ranks.

Parts are joined in memory, or on their way into another file: stretches that stay together are copied from file to
file; a tensor that is cut by columns is put together a few rows at a time in a buffer of 512 KiB. Nothing is mapped
then, so the memory of the process does not grow with the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.storage.arrays import StoredArray
from finetune.storage.dtypes import Array
from finetune.storage.output_file import OutputFile
from finetune.storage.splits import Split

# Few enough for the cache of a processor core, and for what the system takes in one call (IOV_MAX).
_ROWS_BYTES = 2**19
_MAX_PIECES = 1024


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor of a model as its files have it.

    Attributes:
        name: Its name, in the files or in the result.
        parts: One array, or the ranks' arrays in their order.
        split: How they were cut; None for one array.
    """

    name: str
    parts: tuple[StoredArray, ...]
    split: Split | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = self.parts[0].shape
        return self.split.whole_shape(shape, len(self.parts)) if self.split else shape

    def read(self) -> Array:
        """The whole tensor: mapped where one file holds it, joined in memory otherwise."""
        return self.parts[0].read() if self.split is None else self.load()

    def load(self) -> Array:
        """The whole tensor in memory; beside it there is one part at a time."""
        if self.split is None:
            return self.parts[0].load()
        whole = np.empty(self.shape, self.dtype)
        for rank, part in enumerate(self.parts):
            self.split.put(whole, part.load(), degree=len(self.parts), rank=rank)
        return whole

    def write(self, file: OutputFile, offset: int) -> None:
        """Joins the parts on the way into a file, from that offset on."""
        parts = [part.contiguous() for part in self.parts]
        if self.split is None:
            parts[0].copy(0, parts[0].num_bytes, file, offset)
        elif self.split.axis == 0 or len(self.shape) == 1:
            self._write_stretches(parts, file, offset)
        else:
            self._write_rows(parts, file, offset)

    def _places(self, rank: int) -> list[tuple[int, int, int]]:
        """Of each stretch along the split axis: begin in the whole tensor, begin in the part, length."""
        assert self.split is not None
        places, inner = [], 0
        for place in self.split.places(self.shape, len(self.parts), rank):
            begin, end = place[self.split.axis].start, place[self.split.axis].stop
            places.append((begin, inner, end - begin))
            inner += end - begin
        return places

    def _write_stretches(self, parts: list[StoredArray], file: OutputFile, offset: int) -> None:
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        for rank, part in enumerate(parts):
            for outer, inner, length in self._places(rank):
                part.copy(inner * row_bytes, length * row_bytes, file, offset + outer * row_bytes)

    def _write_rows(self, parts: list[StoredArray], file: OutputFile, offset: int) -> None:
        """Reads the same few rows of every part, and writes their pieces in the order of the whole rows."""
        item = self.dtype.itemsize
        num_rows = math.prod(self.shape[:-1])
        row_bytes, part_bytes = self.shape[-1] * item, parts[0].shape[-1] * item
        pieces = sorted(
            (outer * item, rank, inner * item, length * item)
            for rank in range(len(parts))
            for outer, inner, length in self._places(rank)
        )
        step = max(1, min(_ROWS_BYTES // max(row_bytes, 1), _MAX_PIECES // len(pieces), num_rows))
        buffers = [np.empty(step * part_bytes, np.uint8) for _ in parts]
        views = [
            buffers[rank].data[row * part_bytes + inner : row * part_bytes + inner + length]
            for row in range(step)
            for _, rank, inner, length in pieces
        ]
        for begin in range(0, num_rows, step):
            count = min(step, num_rows - begin)
            for part, buffer in zip(parts, buffers, strict=True):
                part.read_bytes(begin * part_bytes, buffer[: count * part_bytes])
            file.gather(views[: count * len(pieces)], offset + begin * row_bytes)
