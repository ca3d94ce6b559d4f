"""Paddle tensors to and from safetensors files, bfloat16 included, without pickle.

The format is written out here (an 8-byte length, a JSON header, the bytes of all tensors)
because NumPy, which the safetensors library goes through, has no bfloat16, and because a tensor
at a time can be written then.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.errors import UserError
from finetune.models.weights import WeightFile, read_header

if TYPE_CHECKING:
    import paddle

_CODES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
# What NumPy holds a type as; bfloat16 has none, its bits come as 16-bit unsigned integers.
_ARRAY_DTYPES = {"bfloat16": "uint16"}
_ALIGNMENT = 8


def array_dtype(dtype: Any) -> np.dtype:
    """NumPy's type for the content of a Paddle tensor of that type."""
    name = dtype_name(dtype)
    return np.dtype(_ARRAY_DTYPES.get(name, name))


def dtype_name(dtype: Any) -> str:
    """The name alone: float32 of `paddle.float32`."""
    return str(dtype).rpartition(".")[2]


class TensorWriter:
    """Writes one safetensors file, a tensor at a time; all names, types and shapes are known beforehand.

    Args:
        path: The file.
        tensors: Name -> (Paddle's name of the type, shape), in the order in which they lie in the file.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, Iterable[int]]]):
        header: dict[str, object] = {"__metadata__": {"format": "np"}}
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            sizes = list(shape)
            begin, end = end, end + num_bytes(dtype, sizes)
            header[name] = {"dtype": _CODES[dtype], "shape": sizes, "data_offsets": [begin, end]}
            self._places[name] = (begin, end)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor; bfloat16 as uint16."""
        begin, end = self._places.pop(name)
        assert array.nbytes == end - begin, f"{name} has {array.nbytes} bytes instead of {end - begin}"
        self._file.seek(self._start + begin)
        if array.size:
            self._file.write(np.ascontiguousarray(array).data.cast("B"))

    def abandon(self) -> None:
        """Closes a file that cannot be completed."""
        with contextlib.suppress(OSError):  # what is still in the buffer has no room, either
            self._file.close()

    def close(self) -> None:
        """Ends the file. All tensors must have been written."""
        self._file.close()
        assert not self._places, f"never written: {sorted(self._places)[:3]}"


def num_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Size of a tensor, from Paddle's name of its type."""
    return int(np.prod(list(shape), dtype=np.int64)) * array_dtype(dtype).itemsize


def save_tensors(path: Path, tensors: Mapping[str, paddle.Tensor]) -> None:
    """Writes tensors of any shape under their names, in their own dtype.

    Args:
        path: The .safetensors file.
        tensors: Name to tensor; bfloat16, float16, float32, float64, integers or booleans.
    """
    specs = {name: (dtype_name(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    writer = TensorWriter(path, specs)
    for name, tensor in tensors.items():
        # numpy() of a bfloat16 tensor is its bit pattern as uint16, which is what the file holds.
        writer.write(name, tensor.numpy())
    writer.close()


def load_tensors(path: Path) -> dict[str, paddle.Tensor]:
    """Reads all tensors of a safetensors file, in the dtypes it was written in."""
    file = TensorFiles([Path(path)])
    return {name: to_tensor(np.array(file.read(name))) for name in file.names}


def to_tensor(array: np.ndarray) -> paddle.Tensor:
    """A tensor of an array's content; uint16 stands for bfloat16."""
    import paddle

    tensor = paddle.to_tensor(np.ascontiguousarray(array).reshape(array.shape))
    return tensor.view("bfloat16") if array.dtype == np.uint16 else tensor


class TensorFiles:
    """Tensors of one or several safetensors files, mapped: nothing is read before it is used.

    Attributes:
        names: Every tensor's shape, by name.
    """

    def __init__(self, paths: Iterable[Path]):
        self._files: dict[str, WeightFile] = {}
        for path in paths:
            file = read_header(path)
            self._files |= dict.fromkeys(file.tensors, file)
        self.names = {name: file.tensors[name][1] for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored; bfloat16 as uint16."""
        file = self._files[name]
        dtype, shape, begin, end = file.tensors[name]
        if begin == end:
            return np.empty(shape, dtype)
        return np.memmap(file.path, dtype=dtype, mode="r", offset=file.data_start + begin, shape=shape)


def open_indexed(folder: Path, index_name: str) -> TensorFiles:
    """Opens the files that an index names.

    Raises:
        UserError: The index or one of the files is missing or damaged.
    """
    path = folder / index_name
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no valid index of tensors ({error}): copy it again") from None
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise UserError(f"{path} names {missing[0]}, which is not in the folder: copy it there")
    return TensorFiles(folder / name for name in names)
