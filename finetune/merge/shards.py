"""Writes safetensors files of any size without holding more of them than a few megabytes.

What a tensor consists of is known before any of it is read: files, places and shapes. So the headers are written
first, and every tensor knows where its bytes belong; two threads then fill the files. Stretches that stay together
go from file to file inside the kernel (`copy_file_range`); a tensor that is split by columns is put together a few
rows at a time in a buffer of 512 KiB. Nothing is mapped, so the memory of the process does not grow with the model.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from finetune.errors import UserError
from finetune.merge.output_file import OutputFile, cut_short
from finetune.models.tensor_splits import Split

_CODES = {"f8": "F64", "f4": "F32", "f2": "F16", "u2": "BF16", "i8": "I64", "i4": "I32", "i2": "I16",
          "i1": "I8", "u1": "U8", "b1": "BOOL"}  # fmt: skip
_ALIGNMENT = 8
_BUFFER_BYTES = 4 * 2**20
# Few enough for the cache of a processor core, and for what the system takes in one call (IOV_MAX).
_ROWS_BYTES = 2**19
_MAX_PIECES = 1024
_NUM_THREADS = 2
_FLUSH_SECONDS = 0.02
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Tensor(Protocol):
    """One tensor of the result; a bfloat16 has the element type uint16."""

    @property
    def name(self) -> str:
        """Its name in the result."""

    @property
    def dtype(self) -> np.dtype:
        """Element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""

    def write(self, file: OutputFile, offset: int) -> None:
        """Puts all its bytes into the file, from that offset on."""


class StoredArray:
    """A tensor of a source file, or the part of it that one rank held.

    Attributes:
        path: The file, for messages.
        dtype: Element type.
        shape: Sizes.
    """

    def __init__(self, path: Path, array: np.ndarray):
        """Takes what a reader gives: mapped into memory and not yet touched, or a small array."""
        self.path = path
        self.dtype = array.dtype.newbyteorder("<")
        self.shape = tuple(array.shape)
        self._start: int | None = None
        self._bytes: np.ndarray | None = None
        if isinstance(array, np.memmap) and array.flags.c_contiguous:
            self._start = int(array.offset)
        else:
            self._bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    @property
    def num_bytes(self) -> int:
        """Size of the whole array."""
        return count_bytes(self)

    def read(self, begin: int, out: np.ndarray) -> None:
        """Fills `out`, an array of bytes, from byte `begin` of the array on.

        Raises:
            UserError: The file is shorter than it was.
        """
        if self._start is None:
            assert self._bytes is not None
            out[:] = self._bytes[begin : begin + out.size]
            return
        view, place = out.data, self._start + begin
        with open(self.path, "rb", buffering=0) as file:
            while view.nbytes:
                count = os.preadv(file.fileno(), [view], place)
                if not count:
                    raise cut_short(self.path)
                view, place = view[count:], place + count

    def blocks(self, num_bytes: int = _BUFFER_BYTES) -> Iterator[np.ndarray]:
        """All bytes, in one buffer that is used again and again."""
        buffer = np.empty(min(num_bytes, self.num_bytes), np.uint8)
        for begin in range(0, self.num_bytes, num_bytes):
            block = buffer[: min(num_bytes, self.num_bytes - begin)]
            self.read(begin, block)
            yield block

    def copy(self, begin: int, size: int, file: OutputFile, offset: int) -> None:
        """Copies bytes of the array to a place in the result."""
        if self._start is None:
            assert self._bytes is not None
            file.write(self._bytes[begin : begin + size], offset)
        else:
            file.copy(self.path, self._start + begin, size, offset)


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor that is whole in one file, or lies in as many parts as there are ranks.

    Attributes:
        name: Its name in the result.
        parts: One array, or the ranks' arrays in their order.
        split: How they were cut; None for one array.
    """

    name: str
    parts: tuple[StoredArray, ...]
    split: Split | None = None

    @property
    def dtype(self) -> np.dtype:
        """Element type."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = self.parts[0].shape
        return self.split.whole_shape(shape, len(self.parts)) if self.split else shape

    def array(self) -> np.ndarray:
        """The whole tensor in memory, for steps that need all of it, such as a transpose."""
        arrays = []
        for part in self.parts:
            flat = np.empty(part.num_bytes, np.uint8)
            part.read(0, flat)
            arrays.append(flat.view(part.dtype).reshape(part.shape))
        return self.split.whole(arrays) if self.split else arrays[0]

    def write(self, file: OutputFile, offset: int) -> None:
        """Joins the parts on the way into the file."""
        if self.split is None:
            self.parts[0].copy(0, self.parts[0].num_bytes, file, offset)
        elif self.split.axis == 0 or len(self.shape) == 1:
            self._write_stretches(file, offset)
        else:
            self._write_rows(file, offset)

    def _places(self, rank: int) -> list[tuple[int, int, int]]:
        """Of each stretch along the split axis: begin in the whole tensor, begin in the part, length."""
        assert self.split is not None
        places, inner = [], 0
        for place in self.split.places(self.shape, len(self.parts), rank):
            begin, end = place[self.split.axis].start, place[self.split.axis].stop
            places.append((begin, inner, end - begin))
            inner += end - begin
        return places

    def _write_stretches(self, file: OutputFile, offset: int) -> None:
        row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        for rank, part in enumerate(self.parts):
            for outer, inner, length in self._places(rank):
                part.copy(inner * row_bytes, length * row_bytes, file, offset + outer * row_bytes)

    def _write_rows(self, file: OutputFile, offset: int) -> None:
        """Reads the same few rows of every part, and writes their pieces in the order of the whole rows."""
        item = self.dtype.itemsize
        num_rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        row_bytes, part_bytes = self.shape[-1] * item, self.parts[0].shape[-1] * item
        pieces = sorted(
            (outer * item, rank, inner * item, length * item)
            for rank in range(len(self.parts))
            for outer, inner, length in self._places(rank)
        )
        step = max(1, min(_ROWS_BYTES // max(row_bytes, 1), _MAX_PIECES // len(pieces), num_rows))
        buffers = [np.empty(step * part_bytes, np.uint8) for _ in self.parts]
        views = [
            buffers[rank].data[row * part_bytes + inner : row * part_bytes + inner + length]
            for row in range(step)
            for _, rank, inner, length in pieces
        ]
        for begin in range(0, num_rows, step):
            count = min(step, num_rows - begin)
            for part, buffer in zip(self.parts, buffers, strict=True):
                part.read(begin * part_bytes, buffer[: count * part_bytes])
            file.gather(views[: count * len(pieces)], offset + begin * row_bytes)


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that is worked out in blocks, in the order of its bytes.

    Attributes:
        name: Its name in the result.
        dtype: Element type of the blocks.
        shape: Sizes of the whole tensor.
        blocks: Gives the blocks, in any shape but all elements in order; called once, in a thread.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]

    def write(self, file: OutputFile, offset: int) -> None:
        """Writes block after block."""
        for block in self.blocks():
            file.write(np.ascontiguousarray(block), offset)
            offset += block.nbytes


@dataclass(frozen=True)
class Layout:
    """How files and index of a result are called and marked.

    Attributes:
        stem: "model" or "peft_model".
        max_shard_bytes: Most bytes of tensors in a file; a larger tensor gets a file of its own.
        format: What the header says of the names' origin: "np" for PaddleNLP's, "pt" for Hugging Face's.
        always_numbered: Whether a single file is numbered and has an index, too.
        index_facts: Further fields of the index.
    """

    stem: str = "model"
    max_shard_bytes: int = 5 * 10**9
    format: str = "np"
    always_numbered: bool = False
    index_facts: tuple[tuple[str, str], ...] = ()


def write_tensors(
    folder: Path,
    tensors: Sequence[Tensor],
    layout: Layout = Layout(),
    *,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> list[Path]:
    """Writes tensors into as many safetensors files as they need, and the index if there are several.

    Args:
        folder: An existing folder.
        tensors: What to write, in this order.
        layout: Names and sizes of the files.
        advance: Hears how many bytes have been written since it was last called, from any thread.

    Returns:
        The safetensors files, each of them on the disk.

    Raises:
        UserError: There is not enough room, or a source ends too early.
    """
    groups = _groups(tensors, layout.max_shard_bytes)
    numbered = layout.always_numbered or len(groups) > 1
    paths = [folder / _file_name(layout.stem, index, len(groups), numbered) for index in range(len(groups))]
    try:
        _fill(list(zip(paths, groups, strict=True)), layout, advance)
        if numbered:
            weight_map = {t.name: path.name for path, group in zip(paths, groups, strict=True) for t in group}
            index = {"metadata": {"total_size": sum(map(count_bytes, tensors))}, "weight_map": weight_map}
            text = json.dumps(index | dict(layout.index_facts), indent=2) + "\n"
            (folder / f"{layout.stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise _no_room(folder, sum(map(count_bytes, tensors)), error) from error
    return paths


def count_bytes(tensor: Tensor | StoredArray) -> int:
    """Size of a tensor's numbers in bytes."""
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


def _fill(
    files: Sequence[tuple[Path, Sequence[Tensor]]], layout: Layout, advance: Callable[[int], None]
) -> None:
    failed = threading.Event()

    def write(tensor: Tensor, file: OutputFile, offset: int) -> None:
        if failed.is_set():  # what is left would be for nothing
            return
        try:
            tensor.write(file, offset)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(_NUM_THREADS) as pool, ExitStack() as stack:
        stack.callback(failed.set)
        for path, group in files:
            with ExitStack() as open_file:
                file = OutputFile(path, advance)
                open_file.callback(file.close)
                header, places = _header(group, layout.format)
                file.write(header, 0)
                jobs = [pool.submit(write, tensor, file, offset) for tensor, offset in places]
                pending = set(jobs)
                while pending:
                    finished, pending = wait(pending, _FLUSH_SECONDS, return_when=FIRST_EXCEPTION)
                    for job in finished:
                        job.result()
                    file.flush_some()


def _header(tensors: Sequence[Tensor], format_name: str) -> tuple[bytes, list[tuple[Tensor, int]]]:
    """First bytes of a file, and where in it each tensor begins."""
    entries: dict[str, object] = {"__metadata__": {"format": format_name}}
    places, end = [], 0
    # Wide types first, so that every tensor begins at a multiple of its element's size.
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize):
        begin, end = end, end + count_bytes(tensor)
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype.str[1:]],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        places.append((tensor, begin))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return header, [(tensor, len(header) + begin) for tensor, begin in places]


def _groups(tensors: Sequence[Tensor], max_bytes: int) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = [[]]
    room = max_bytes
    for tensor in tensors:
        size = count_bytes(tensor)
        if size > room and groups[-1]:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room -= size
    return groups


def _file_name(stem: str, index: int, count: int, numbered: bool) -> str:
    return f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors" if numbered else f"{stem}.safetensors"


def _no_room(folder: Path, num_bytes: int, error: OSError) -> UserError:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    return UserError(
        f"{folder.parent} has no room for the result ({error.strerror}): it needs {num_bytes / 1e9:.3g} GB and "
        f"{free / 1e9:.3g} GB are free now. Make room, or choose a folder on another disk"
    )
