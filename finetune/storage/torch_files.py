"""Tensors of PyTorch's `.bin` files, without PyTorch and without running what is in them.

Since PyTorch 1.6 such a file is an uncompressed zip archive: `<name>/data.pkl` is a pickle of names and
shapes, `<name>/data/<key>` holds the bytes of one storage each. The pickle goes through the unpickler of `pickles`,
which learns tensors and kinds of storage here; the bytes are mapped into memory where they lie. The layout is the one
that `torch.save` writes (torch/serialization.py, torch/_utils.py).
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.errors import UserError
from finetune.storage.arrays import StoredArray, c_strides
from finetune.storage.dtypes import NAMES, TORCH_STORAGES
from finetune.storage.pickles import TensorUnpickler, load_pickle

_REMEDY = "Open it with PyTorch where you trust it and save the model as safetensors"
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
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is no zip archive: it is cut short, or was written in the format before PyTorch 1.6, "
            f"which is not read. Copy it again. If that does not help: {_REMEDY}"
        )
    content = load_pickle(path, lambda: _load(path))
    nested = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(f"{path} holds tensors inside {nested[0]!r}, not at the top: save that part alone")
    return {str(name): value for name, value in content.items() if isinstance(value, StoredArray)}


def _load(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise ValueError(f"{len(names)} members called data.pkl")
        folder = names[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise pickle.UnpicklingError(f"its numbers are big-endian. {_REMEDY}")
        return _TorchUnpickler(io.BytesIO(archive.read(names[0])), path, archive, folder).load()


class _TorchUnpickler(TensorUnpickler):
    """Resolves what a dictionary of tensors needs: strings and bound methods."""

    def __init__(self, file: io.BytesIO, path: Path, archive: zipfile.ZipFile, folder: str):
        allowed = {
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): self._rebuild_parameter,
            **{("torch", storage): dtype for storage, dtype in TORCH_STORAGES.items()},
            **{("torch", name): name for name in NAMES},
        }
        super().__init__(file, allowed, _REMEDY)
        self._path = path
        self._archive = archive
        self._folder = folder

    def persistent_load(self, saved_id: Any) -> _Storage:
        kind, dtype, key, _location, size = saved_id
        if kind != "storage" or dtype not in TORCH_STORAGES.values():
            raise ValueError(f"unknown kind of storage {kind!r}")
        info = self._archive.getinfo(f"{self._folder}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"it is compressed, so it cannot be mapped into memory. {_REMEDY}")
        # The directory at the end of the archive may differ from the member's own header in its extra field.
        archive = self._archive.fp
        assert archive is not None
        archive.seek(info.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(archive.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        num_bytes = info.file_size
        if start + num_bytes > archive.seek(0, io.SEEK_END):
            raise ValueError(f"storage {key} reaches past the end of the file")
        if size * np.dtype(dtype).itemsize > num_bytes:
            raise ValueError(f"storage {key} has {num_bytes} bytes, too few for {size} x {dtype}")
        return _Storage(start, dtype, size)

    def _rebuild_tensor(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_unused: Any
    ) -> StoredArray:
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        end = offset + (last + 1 if math.prod(shape) else 0)
        if min((offset, *shape, *stride)) < 0 or end > storage.size:
            raise ValueError(f"a tensor of shape {list(shape)} reaches outside its storage")
        dtype = np.dtype(storage.dtype)
        strides: tuple[int, ...] | None = tuple(step * dtype.itemsize for step in stride)
        if strides == c_strides(tuple(shape), dtype.itemsize):
            strides = None
        return StoredArray(
            self._path, dtype, tuple(shape), storage.start + offset * dtype.itemsize, strides=strides
        )

    def _rebuild_parameter(self, data: StoredArray, *_unused: Any) -> StoredArray:
        return data
