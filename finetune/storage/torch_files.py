"""Tensors of PyTorch's `.bin` files, without PyTorch and without running what is in them.

Since PyTorch 1.6 such a file is an uncompressed zip archive: `<name>/data.pkl` is a pickle of names and
shapes, `<name>/data/<key>` holds the bytes of one storage each. The pickle goes through the reader of `pickles`,
which learns tensors and kinds of storage here; the bytes are mapped into memory where they lie. The layout is the one
that `torch.save` writes (torch/serialization.py, torch/_utils.py). Nothing is ever inflated: what PyTorch stores is
stored as it is.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from finetune.errors import UserError
from finetune.storage.arrays import StoredArray, c_strides
from finetune.storage.dtypes import NAMES, TORCH_STORAGES
from finetune.storage.files import open_file
from finetune.storage.pickle_values import MAX_AXES, Constructor
from finetune.storage.pickles import PickleReader, load_pickle

_REMEDY = "Open it with PyTorch where you trust it and save the model as safetensors"
_MAX_DIRECTORY_BYTES = 16 * 2**20  # about 200,000 members
_MAX_PICKLE_BYTES = 64 * 2**20  # about 300,000 tensors
_END_SIZE = 5  # where zipfile's record of the end of an archive has the size of the directory
_ENCRYPTED = 1  # bit of a member's flags
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member; ends in the lengths of its name and extra field


class _Storage(NamedTuple):
    """One run of numbers in the file: its first byte, element type and number of elements."""

    start: int
    dtype: str
    size: int


def read_torch_file(path: Path) -> dict[str, StoredArray]:
    """Where the tensors of a `.bin` file lie, by name; their bytes are not touched.

    Raises:
        UserError: The file is in the format before PyTorch 1.6, is damaged or compressed, holds anything
            but tensors by name, or names an object that could run code.
    """
    with open_file(path) as file:
        content = load_pickle(path, lambda: _load(file, path))
    nested = [name for name, value in content.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(f"{path} holds tensors inside {nested[0]!r}, not at the top: save that part alone")
    tensors = {name: value for name, value in content.items() if isinstance(value, StoredArray)}
    if not tensors:
        raise UserError(f"{path} holds no tensors: put the right file there")
    return tensors


def _load(file: BinaryIO, path: Path) -> Any:
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is None:
        raise UserError(
            f"{path} is no zip archive: it is cut short, or was written in the format before PyTorch 1.6, "
            f"which is not read. Copy it again. If that does not help: {_REMEDY}"
        )
    if end[_END_SIZE] > _MAX_DIRECTORY_BYTES:
        raise ValueError(f"the directory of the archive has more than {_MAX_DIRECTORY_BYTES} bytes")
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise ValueError(f"{len(names)} members called data.pkl")
        return _TensorReader(_Members(archive, file, names[0].removesuffix("data.pkl")), path).load()


class _Members:
    """What an archive of PyTorch's holds, read and found without inflating anything.

    Args:
        archive: The archive.
        file: The file that it is read from.
        folder: The start of the names of all members.
    """

    def __init__(self, archive: zipfile.ZipFile, file: BinaryIO, folder: str):
        self._archive, self._file, self._folder = archive, file, folder
        self.size = file.seek(0, io.SEEK_END)

    def read(self, name: str) -> bytes | None:
        """The content of a member; None where there is no such one."""
        if f"{self._folder}{name}" not in self._archive.NameToInfo:
            return None
        start, num_bytes = self.find(name)
        if num_bytes > _MAX_PICKLE_BYTES:
            raise ValueError(f"{name} has more than {_MAX_PICKLE_BYTES} bytes")
        self._file.seek(start)
        return self._file.read(num_bytes)

    def find(self, name: str) -> tuple[int, int]:
        """First byte and size of a member in the file.

        Raises:
            KeyError: There is no such one.
            UnpicklingError: It is compressed or encrypted.
            ValueError: It reaches past the end of the file.
        """
        info = self._archive.getinfo(f"{self._folder}{name}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise pickle.UnpicklingError(
                f"it is compressed or encrypted, so it cannot be mapped into memory. {_REMEDY}"
            )
        # The directory at the end of the archive may differ from the member's own header in its extra field.
        self._file.seek(info.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(self._file.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if info.file_size != info.compress_size or start + info.file_size > self.size:
            raise ValueError(f"{name} reaches past the end of the file")
        return start, info.file_size


class _TensorReader(PickleReader):
    """Knows what a dictionary of tensors needs."""

    def __init__(self, members: _Members, path: Path):
        allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): Constructor(self._rebuild_tensor),
            ("torch._utils", "_rebuild_parameter"): Constructor(self._rebuild_parameter),
            **{("torch", storage): dtype for storage, dtype in TORCH_STORAGES.items()},
            **{("torch", name): name for name in NAMES},
        }
        content = members.read("data.pkl") or b""
        super().__init__(io.BytesIO(content), len(content), allowed, _REMEDY)
        if members.read("byteorder") not in (None, b"little"):
            raise self.refusal("its numbers are big-endian")
        self._path = path
        self._members = members

    def load_persistent(self, saved_id: Any) -> _Storage:
        """The place of a storage, from ("storage", kind, key, device, number of elements)."""
        kind, dtype, key, _location, size = saved_id
        if kind != "storage" or dtype not in TORCH_STORAGES.values():
            raise ValueError("it holds an unknown kind of storage")
        if not (isinstance(key, str) and isinstance(size, int)):
            raise ValueError("a storage has no key and size")
        start, num_bytes = self._members.find(f"data/{key}")
        if not 0 <= size * np.dtype(dtype).itemsize <= num_bytes:
            raise ValueError(f"storage {key} has {num_bytes} bytes, too few for {size} x {dtype}")
        return _Storage(start, dtype, size)

    def _rebuild_tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, *_unused: Any
    ) -> StoredArray:
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without storage")
        if not (_are_naturals((offset,)) and _are_naturals(shape) and _are_naturals(stride)):
            raise ValueError("a tensor has no offset, shape and strides")
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        end = offset + (last + 1 if math.prod(shape) else 0)
        if end > storage.size:
            raise ValueError(f"a tensor of shape {list(shape)} reaches outside its storage")
        dtype = np.dtype(storage.dtype)
        # Strides of 0 can repeat a number without end.
        if math.prod(max(size, 1) for size in shape) * dtype.itemsize > self._members.size:
            raise ValueError(f"a tensor of shape {list(shape)} is larger than the file")
        strides: tuple[int, ...] | None = tuple(step * dtype.itemsize for step in stride)
        if strides == c_strides(shape, dtype.itemsize):
            strides = None
        return StoredArray(self._path, dtype, shape, storage.start + offset * dtype.itemsize, strides=strides)

    def _rebuild_parameter(self, data: Any, *_unused: Any) -> Any:
        return data


def _are_naturals(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_AXES
        and all(isinstance(each, int) and each >= 0 for each in value)
    )
