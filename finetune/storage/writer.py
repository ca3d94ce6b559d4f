"""Writes safetensors files of any size without holding more of them than a few megabytes.

What a tensor consists of is known before any of it is read: files, places and shapes. So the headers are written
first, and every tensor knows where its bytes belong; two threads then fill the files. The safetensors library wants
all tensors of a file in memory, so it is no writer for checkpoints that are gathered, joined or merged on the way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import UserError, find_remedy
from finetune.storage.dtypes import Array, num_bytes
from finetune.storage.files import NO_ROOM, write_json
from finetune.storage.joined_tensors import JoinedTensor
from finetune.storage.output_file import OutputFile
from finetune.storage.safetensors_files import encode_header

_NUM_THREADS = 2
_FLUSH_SECONDS = 0.02


class TensorWriter:
    """One safetensors file that is filled a tensor at a time, in any order.

    Args:
        path: The file.
        tensors: Name -> (element type, shape) of all tensors.
        format: Who named them: "np" for PaddleNLP, "pt" for Hugging Face.
        advance: Hears how many bytes have been written since it was last called.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[Any, Iterable[int]]],
        *,
        format: str = "np",
        advance: Callable[[int], None] = lambda num_bytes: None,
    ):
        header, self._places = encode_header(tensors, format)
        self._sizes = {name: num_bytes(dtype, shape) for name, (dtype, shape) in tensors.items()}
        self.file = OutputFile(path, advance)
        try:
            self.file.write(header, 0)
        except OSError:
            self.abandon()
            raise

    def place(self, name: str) -> int:
        """Where the bytes of a tensor begin, for the one who writes them."""
        return self._places.pop(name)

    def write(self, name: str, array: Array) -> None:
        """Writes one tensor; bfloat16 as uint16."""
        size = self._sizes[name]
        assert array.nbytes == size, f"{name} has {array.nbytes} bytes instead of {size}"
        self.file.write(np.ascontiguousarray(array), self.place(name))

    def abandon(self) -> None:
        """Closes a file that cannot be completed."""
        with suppress(OSError):
            self.file.close()

    def close(self) -> None:
        """Ends the file. All tensors must have been written."""
        self.file.close()
        assert not self._places, f"never written: {sorted(self._places)[:3]}"


def plan_files(sizes: Mapping[str, int], max_bytes: int | None) -> list[list[str]]:
    """Names of tensors by the file that they go to, in their order.

    Args:
        sizes: Bytes of each tensor.
        max_bytes: Most bytes of tensors in a file; a larger tensor gets a file of its own. None: one file.
    """
    files: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not files or (max_bytes is not None and filled + size > max_bytes):
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def file_names(stem: str, num_files: int, *, numbered: bool) -> list[str]:
    """Names of the files of a checkpoint: numbered, or the one."""
    if not numbered:
        return [f"{stem}.safetensors"] * num_files
    return [f"{stem}-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]


def write_index(
    folder: Path, stem: str, files: Mapping[str, Sequence[str]], *, num_bytes: int, facts: Mapping[str, Any]
) -> None:
    """Writes which file holds which tensor.

    Args:
        folder: Of the files.
        stem: First part of their names.
        files: Names of the tensors in each file.
        num_bytes: Size of all tensors.
        facts: More fields.
    """
    placed = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(placed.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index | dict(facts))


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that is worked out in blocks, in the order of its bytes.

    Attributes:
        name: Its name in the result.
        dtype: Element type of the blocks.
        shape: Sizes of the whole tensor.
        blocks: Gives the blocks, in any shape but all elements in order; a block is valid until the next one is
            asked for.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Array]]

    def write(self, file: OutputFile, offset: int) -> None:
        """Writes block after block."""
        for block in self.blocks():
            file.write(np.ascontiguousarray(block), offset)
            offset += block.nbytes


Tensor = JoinedTensor | ComputedTensor
"""One tensor of a result, of known name, type and shape, that writes itself."""


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
    by_name = {tensor.name: tensor for tensor in tensors}
    assert len(by_name) == len(tensors), "two tensors of one name"
    sizes = {name: count_bytes(tensor) for name, tensor in by_name.items()}
    plan = plan_files(sizes, layout.max_shard_bytes) or [[]]
    numbered = layout.always_numbered or len(plan) > 1
    files = dict(zip(file_names(layout.stem, len(plan), numbered=numbered), plan, strict=True))
    total = sum(sizes.values())
    try:
        for file, names in files.items():
            _fill(folder / file, [by_name[name] for name in names], layout.format, advance)
        if numbered:
            write_index(folder, layout.stem, files, num_bytes=total, facts=dict(layout.index_facts))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise _no_room(folder, total, error) from error
    return [folder / file for file in files]


def count_bytes(tensor: Tensor) -> int:
    """Size of a tensor's numbers in bytes."""
    return num_bytes(tensor.dtype, tensor.shape)


def _fill(path: Path, tensors: Sequence[Tensor], format_name: str, advance: Callable[[int], None]) -> None:
    failed = threading.Event()

    def write(tensor: Tensor, offset: int) -> None:
        if failed.is_set():  # what is left would be for nothing
            return
        try:
            tensor.write(writer.file, offset)
        except BaseException:
            failed.set()
            raise

    specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    writer = TensorWriter(path, specs, format=format_name, advance=advance)
    try:
        with ThreadPoolExecutor(_NUM_THREADS) as pool, ExitStack() as stack:
            stack.callback(failed.set)  # before the pool waits for its threads
            pending = {pool.submit(write, tensor, writer.place(tensor.name)) for tensor in tensors}
            while pending:
                finished, pending = wait(pending, _FLUSH_SECONDS, return_when=FIRST_EXCEPTION)
                for job in finished:
                    job.result()
                writer.file.flush_some()
        writer.file.sync()
    except BaseException:
        writer.abandon()
        raise
    writer.close()


def _no_room(folder: Path, num_bytes: int, error: OSError) -> UserError:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    return UserError(
        f"{folder.parent} has no room for the result ({error.strerror}): it needs {num_bytes / 1e9:.3g} GB and "
        f"{free / 1e9:.3g} GB are free now: {find_remedy(error.errno)}"
    )
