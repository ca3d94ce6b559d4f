"""Writes `.bin` files as `torch.save` lays them out, without PyTorch; a test compares with PyTorch's own."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

_STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "uint16": "BFloat16Storage",  # the bits of bfloat16
    "int64": "LongStorage",
}
_ALIGNMENT = 64


def save_bin(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    compression: int = zipfile.ZIP_STORED,
    claimed_shape: tuple[int, ...] | None = None,
) -> None:
    """Writes tensors by name, one storage each; a transposed array is stored as a transposed view.

    Args:
        path: The file.
        tensors: float32, float16, int64, or bfloat16 as uint16.
        compression: A method of zipfile; `torch.save` uses none.
        claimed_shape: What the pickle says of every tensor's shape, to write a faulty file.
    """
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", _pickle(tensors, claimed_shape))
        for key, array in enumerate(tensors.values()):
            info = zipfile.ZipInfo(f"archive/data/{key}")
            info.compress_type = compression
            header = archive.fp.tell() + 30 + len(info.filename) + 4
            info.extra = struct.pack("<HH", 0x4246, -header % _ALIGNMENT) + b"Z" * (-header % _ALIGNMENT)
            archive.writestr(info, np.asarray(_stored(array)).tobytes())


def _stored(array: np.ndarray) -> np.ndarray:
    return array if array.flags.c_contiguous else array.T


def _pickle(tensors: dict[str, np.ndarray], claimed_shape: tuple[int, ...] | None) -> bytes:
    parts = [b"\x80\x02", b"}"]
    for key, (name, array) in enumerate(tensors.items()):
        strides = tuple(step // array.itemsize for step in array.strides)
        storage = f"ctorch\n{_STORAGES[array.dtype.name]}\n".encode()
        parts += [
            _plain(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            b"("
            + _plain("storage")
            + storage
            + _plain(str(key))
            + _plain("cpu")
            + _plain(array.size)
            + b"tQ",
            _plain(0) + _plain(claimed_shape or array.shape) + _plain(strides) + b"\x89",
            b"ccollections\nOrderedDict\n)RtR",
            b"s",
        ]
    return b"".join([*parts, b"."])


def _plain(value: object) -> bytes:
    """The instructions that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]
