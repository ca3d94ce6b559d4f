"""Where an array lies in a file. Its numbers are mapped, read in blocks, or copied from file to file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.storage.dtypes import Array
from finetune.storage.output_file import OutputFile, truncation_error

_BLOCK_BYTES = 4 * 2**20


class StoredArray(NamedTuple):
    """An array that stays in its file until it is asked for.

    A tuple, because a pickle can overwrite the attributes of objects it builds, but not those of a tuple.

    Attributes:
        path: The file.
        dtype: Element type; bfloat16 is uint16.
        shape: Sizes.
        start: First byte in the file.
        strides: Bytes from one index to the next, for every axis; None where the rows lie one behind the other.
        content: All bytes, where the file has them in another form than as they are.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int = 0
    strides: tuple[int, ...] | None = None
    content: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Array:
        """The array as stored: mapped and read-only.

        Raises:
            UserError: The file has become shorter.
        """
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        shape = self.shape if self.strides is None else (self._span(),)
        flat: Array
        if self.content is not None:
            flat = np.frombuffer(self.content, self.dtype).reshape(shape)
        elif self.start + math.prod(shape) * self.dtype.itemsize > self.path.stat().st_size:
            raise truncation_error(self.path)
        else:
            flat = np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.start, shape=shape)
        if self.strides is None:
            return flat
        return np.lib.stride_tricks.as_strided(flat, self.shape, self.strides, subok=True, writeable=False)

    def _span(self) -> int:
        """Elements from the first to the last one, both included."""
        assert self.strides is not None
        steps = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        return 1 + steps // self.dtype.itemsize

    def contiguous(self) -> StoredArray:
        """The same array with its rows one behind the other: itself, or a copy in memory."""
        if self.strides is None:
            return self
        return self._replace(strides=None, content=self.read().tobytes())

    def read_bytes(self, begin: int, out: Array) -> None:
        """Fills `out`, an array of bytes, from byte `begin` of a contiguous array on; nothing is mapped.

        Raises:
            UserError: The file has become shorter.
        """
        assert self.strides is None
        view = out.data
        if self.content is not None:
            view[:] = memoryview(self.content)[begin : begin + view.nbytes]
            return
        place = self.start + begin
        with open(self.path, "rb", buffering=0) as file:
            while view.nbytes:
                count = os.preadv(file.fileno(), [view], place)
                if not count:
                    raise truncation_error(self.path)
                view, place = view[count:], place + count

    def load(self) -> Array:
        """The array in memory."""
        source = self.contiguous()
        flat = np.empty(self.num_bytes, np.uint8)
        source.read_bytes(0, flat)
        return flat.view(self.dtype).reshape(self.shape)

    def blocks(self, block_bytes: int = _BLOCK_BYTES) -> Iterator[Array]:
        """All bytes, in one buffer that is used again and again."""
        source = self.contiguous()
        buffer = np.empty(min(block_bytes, self.num_bytes), np.uint8)
        for begin in range(0, self.num_bytes, block_bytes):
            block = buffer[: self.num_bytes - begin]
            source.read_bytes(begin, block)
            yield block

    def copy(self, begin: int, size: int, file: OutputFile, offset: int) -> None:
        """Copies bytes of a contiguous array to a place in another file."""
        assert self.strides is None
        if self.content is None:
            file.copy(self.path, self.start + begin, size, offset)
        else:
            file.write(self.content[begin : begin + size], offset)


def c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides of an array whose rows lie one behind the other."""
    return tuple(math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape)))
