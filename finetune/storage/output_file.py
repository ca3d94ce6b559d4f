"""A file that several threads fill at places of their own, from memory or straight from other files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from finetune.errors import UserError
from finetune.storage.dtypes import Array

_BUFFER_BYTES = 4 * 2**20
_COPY_BYTES = 16 * 2**20
# The disk works while the next tensors are put together, instead of after them.
_FLUSH_BYTES = 64 * 2**20
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)


class OutputFile:
    """A file that several threads fill at places of their own."""

    def __init__(self, path: Path, advance: Callable[[int], None] = lambda num_bytes: None):
        """Creates the file; `advance` hears how many bytes have been added."""
        self.path = path
        self._heard = advance
        self._unflushed = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, content: bytes | Array, offset: int) -> None:
        """Writes bytes, or a contiguous array, at an offset."""
        view = (
            content.reshape(-1).view(np.uint8).data
            if isinstance(content, np.ndarray)
            else memoryview(content)
        )
        while view.nbytes:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count
            self._advance(count)

    def gather(self, pieces: Sequence[memoryview], offset: int) -> None:
        """Writes up to 1024 pieces of memory, one behind the other, at an offset."""
        size = sum(piece.nbytes for piece in pieces)
        written = os.pwritev(self._descriptor, pieces, offset)
        self._advance(written)
        if written < size:  # the disk is nearly full, or the system takes less at once
            self.write(b"".join(pieces)[written:], offset + written)

    def copy(self, source: Path, begin: int, size: int, offset: int) -> None:
        """Copies bytes of another file, without taking them into memory where the system can.

        Raises:
            UserError: The other file ends too early.
        """
        with open(source, "rb", buffering=0) as file:
            while size:
                count = self._copy_some(file.fileno(), begin, min(size, _COPY_BYTES), offset)
                if not count:
                    raise truncation_error(source)
                begin, size, offset = begin + count, size - count, offset + count
                self._advance(count)

    def _copy_some(self, source: int, begin: int, size: int, offset: int) -> int:
        if hasattr(os, "copy_file_range"):
            try:
                return os.copy_file_range(source, self._descriptor, size, begin, offset)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
        return os.pwrite(self._descriptor, os.pread(source, min(size, _BUFFER_BYTES), begin), offset)

    def _advance(self, num_bytes: int) -> None:
        self._unflushed += num_bytes  # threads may lose some: it only says when to flush
        self._heard(num_bytes)

    def flush_some(self) -> None:
        """Puts on the disk what is there so far, when it is much; other threads may go on writing."""
        if self._unflushed >= _FLUSH_BYTES:
            self._unflushed = 0
            os.fdatasync(self._descriptor)

    def sync(self) -> None:
        """Puts everything on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Ends the writing."""
        os.close(self._descriptor)


def truncation_error(path: Path) -> UserError:
    """What to say of a source that ends too early."""
    return UserError(f"{path} is cut short or was changed while it was read: copy it again")
