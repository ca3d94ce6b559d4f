"""Paddle tensors to and from safetensors files, bfloat16 included, without pickle.

The format is written out here (an 8-byte length, a JSON header, the bytes of all tensors)
because NumPy, which the safetensors library goes through, has no bfloat16.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import paddle

_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_ALIGNMENT = 8


def save_tensors(path: Path, tensors: Mapping[str, paddle.Tensor]) -> None:
    """Writes floating-point tensors of any shape under their names, in their own dtype.

    Args:
        path: The .safetensors file.
        tensors: Name to tensor; dtypes bfloat16, float16, float32 or float64.
    """
    header: dict[str, object] = {"__metadata__": {"format": "np"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + int(tensor.size) * tensor.element_size()
        dtype = _CODES[str(tensor.dtype).rpartition(".")[2]]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            # numpy() of a bfloat16 tensor is its bit pattern as uint16, which is what the file holds.
            file.write(np.ascontiguousarray(tensor.numpy()).data.cast("B") if tensor.size else b"")


def load_tensors(path: Path) -> dict[str, paddle.Tensor]:
    """Reads all tensors of a safetensors file, in the dtypes it was written in."""
    import paddle

    from finetune.models.weights import read_header

    file = read_header(Path(path))
    tensors = {}
    for name, (dtype, shape, begin, end) in file.tensors.items():
        count = (end - begin) // dtype.itemsize
        with open(path, "rb") as stream:
            stream.seek(file.data_start + begin)
            array = np.fromfile(stream, dtype, count).reshape(shape)
        tensor = paddle.to_tensor(array)
        # bfloat16 has no NumPy type; its bits come as uint16.
        tensors[name] = tensor.view("bfloat16") if dtype == np.uint16 else tensor
    return tensors
