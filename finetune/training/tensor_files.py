"""Paddle tensors to and from safetensors files, bfloat16 included, without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import paddle

_FILE_NAMES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "float64": "float64"}
_STORED_AS = {"BF16": "uint16", "F16": "float16", "F32": "float32", "F64": "float64"}


def save_tensors(path: Path, tensors: Mapping[str, paddle.Tensor]) -> None:
    """Writes floating-point tensors of any shape under their names, in their own dtype.

    Args:
        path: The .safetensors file.
        tensors: Name to tensor; dtypes bfloat16, float16, float32 or float64.
    """
    from safetensors import serialize_file

    entries = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).rpartition(".")[2]
        # numpy() of a bfloat16 tensor is its bit pattern as uint16, which is what the file holds.
        array = np.ascontiguousarray(tensor.numpy())
        entries[name] = {"dtype": _FILE_NAMES[dtype], "shape": list(tensor.shape), "data": array.tobytes()}
    serialize_file(entries, str(path), {"format": "np"})


def load_tensors(path: Path) -> dict[str, paddle.Tensor]:
    """Reads what `save_tensors` wrote, in the dtypes it was written in."""
    import paddle
    from safetensors import deserialize

    tensors = {}
    for name, entry in deserialize(Path(path).read_bytes()):
        array = np.frombuffer(entry["data"], dtype=_STORED_AS[entry["dtype"]]).reshape(entry["shape"])
        tensor = paddle.to_tensor(array)
        tensors[name] = tensor.view("bfloat16") if entry["dtype"] == "BF16" else tensor
    return tensors
