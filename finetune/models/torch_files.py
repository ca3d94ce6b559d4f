"""Tensors of PyTorch's `.bin` files, without PyTorch and without running what is in them.

Since PyTorch 1.6 such a file is an uncompressed zip archive: `<name>/data.pkl` is a pickle of names and
shapes, `<name>/data/<key>` holds the bytes of one storage each. The pickle goes through an unpickler that
knows ordered dictionaries, tensors and kinds of storage and refuses everything else; the bytes are mapped
into memory where they lie, so a tensor costs nothing until it is used. The layout is the one that
`torch.save` writes (torch/serialization.py, torch/_utils.py).
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.errors import UserError

_REMEDY = "Open it with PyTorch where you trust it and save the model as safetensors"

_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",  # NumPy has no bfloat16: its bits, see `weights.as_float32`
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member; ends in the lengths of its name and extra field


class _Storage(NamedTuple):
    """One run of numbers in the file: its first byte, element type and number of elements."""

    start: int
    dtype: str
    size: int


class TorchTensor(NamedTuple):
    """A tensor's place in a file.

    A tuple, because a pickle can overwrite the attributes of objects it builds, but not those of a tuple.

    Attributes:
        path: The file.
        start: Its first byte there.
        dtype: NumPy's name of the element type; bfloat16 is "<u2".
        shape: Sizes.
        stride: Elements from one index to the next, for every dimension.
    """

    path: Path
    start: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The tensor as stored, mapped read-only."""
        dtype = np.dtype(self.dtype)
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        flat = np.memmap(self.path, dtype=dtype, mode="r", offset=self.start, shape=(_span(self),))
        strides = tuple(step * dtype.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, subok=True, writeable=False)


def _span(tensor: TorchTensor) -> int:
    """Elements from a tensor's first to its last one, both included."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True))


def read_torch_file(path: Path) -> dict[str, TorchTensor]:
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
    try:
        content = _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except (zipfile.BadZipFile, EOFError, ValueError, IndexError, TypeError, KeyError, AttributeError,
            struct.error, NotImplementedError) as error:  # fmt: skip
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): copy it again") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    nested = [str(name) for name, value in content.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(f"{path} holds tensors inside {nested[0]!r}, not at the top: save that part alone")
    return {str(name): value for name, value in content.items() if isinstance(value, TorchTensor)}


def _load_pickle(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise ValueError(f"{len(names)} members called data.pkl")
        folder = names[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise pickle.UnpicklingError(f"its numbers are big-endian. {_REMEDY}")
        data = archive.read(names[0])
        return _TensorUnpickler(io.BytesIO(data), path, _Members(archive, folder)).load()


class _Members:
    """The storages of an archive."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        self._archive = archive
        self._folder = folder

    def find(self, key: str) -> tuple[int, int]:
        """First byte and number of bytes of the storage called `key`.

        Raises:
            KeyError: There is no such storage.
            UnpicklingError: It is compressed.
        """
        info = self._archive.getinfo(f"{self._folder}data/{key}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"it is compressed, so it cannot be mapped into memory. {_REMEDY}")
        # The directory at the end of the archive may differ from the member's own header in its extra field.
        file = self._archive.fp
        assert file is not None
        file.seek(info.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if start + info.file_size > file.seek(0, io.SEEK_END):
            raise ValueError(f"storage {key} reaches past the end of the file")
        return start, info.file_size


class _TensorUnpickler(pickle.Unpickler):
    """Resolves only what a dictionary of tensors needs."""

    def __init__(self, file: io.BytesIO, path: Path, members: _Members):
        super().__init__(file)
        self._path = path
        self._members = members

    def find_class(self, module: str, name: str) -> Any:
        # Bound methods and strings: nothing here has attributes that a pickle could change.
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): self._rebuild_parameter,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(
            f"it contains {module}.{name}, which could run code or is unknown here; only tensors are read. {_REMEDY}"
        )

    def persistent_load(self, saved_id: Any) -> _Storage:
        kind, dtype, key, _location, size = saved_id
        if kind != "storage" or dtype not in _STORAGES.values():
            raise ValueError(f"unknown kind of storage {kind!r}")
        start, num_bytes = self._members.find(key)
        if size * np.dtype(dtype).itemsize > num_bytes:
            raise ValueError(f"storage {key} has {num_bytes} bytes, too few for {size} x {dtype}")
        return _Storage(start, dtype, size)

    def _rebuild_tensor(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_unused: Any
    ) -> TorchTensor:
        start = storage.start + offset * np.dtype(storage.dtype).itemsize
        tensor = TorchTensor(self._path, start, storage.dtype, tuple(shape), tuple(stride))
        if min((offset, *shape, *stride)) < 0 or offset + _span(tensor) > storage.size:
            raise ValueError(f"a tensor of shape {list(shape)} reaches outside its storage")
        return tensor

    def _rebuild_parameter(self, data: TorchTensor, *_unused: Any) -> TorchTensor:
        return data
