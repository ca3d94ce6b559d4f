"""Tensors of Paddle's `.pdparams` files (and `.pdopt`), one at a time and without running what is in them.

Such a file is one pickle of NumPy arrays by name (`paddle.save`, protocol 4 by default). The unpickler of `pickles`
goes over it, and where a long byte string comes it notes the place and steps over it. An array is then mapped into
memory where it lies. Only what protocol 2 stores, bytes spelled as text, is held in memory.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

from finetune.errors import UserError
from finetune.storage.arrays import StoredArray, c_strides
from finetune.storage.pickles import TensorUnpickler, load_pickle

_REMEDY = "Save the model as safetensors where you trust it"
_LONG_BYTES = 1024
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")


class _Place(NamedTuple):
    """A byte string that stayed in the file."""

    start: int
    size: int


class _ArrayBuilder:
    """Stands for an array while its pickle is read. Only `__setstate__`, which checks, can fill it."""

    __slots__ = ("_path", "stored")

    def __init__(self, path: Path):
        self._path = path
        self.stored = StoredArray(path, np.dtype(np.float32), (0,))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes what NumPy pickles of an array: version, shape, element type, order and bytes.

        Raises:
            ValueError: The parts do not belong together.
        """
        _version, shape, dtype, fortran, raw = state
        is_known = isinstance(dtype, np.dtype) and not dtype.hasobject
        if not is_known or not isinstance(raw, bytes | bytearray | _Place):
            raise ValueError("an array holds something else than numbers")
        if dtype.byteorder == ">":
            raise pickle.UnpicklingError(f"its numbers are big-endian. {_REMEDY}")
        size = raw.size if isinstance(raw, _Place) else len(raw)
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"an array of shape {list(shape)} has {size} bytes")
        strides = c_strides(shape[::-1], dtype.itemsize)[::-1] if fortran else None
        # A type of its own: the pickle could still change the one that it has built.
        stored = StoredArray(self._path, np.dtype(dtype.str), tuple(shape), strides=strides)
        if isinstance(raw, _Place):
            self.stored = stored._replace(start=raw.start)
        else:
            self.stored = stored._replace(content=bytes(raw))


def read_pdparams(path: Path) -> dict[str, StoredArray]:
    """The arrays of a `.pdparams` file, by name.

    Raises:
        UserError: It holds anything but arrays and plain containers, or is damaged.
    """
    with path.open("rb") as file:
        content = load_pickle(path, _ArrayUnpickler(file, path).load)
    if "UnpackBigParamInfor@@" in content:
        raise UserError(f"{path} splits large tensors in an old way: save the model as safetensors")
    # Paddle stores a tensor as (its inner name, array).
    found = {
        name: value[1] if isinstance(value, tuple) and len(value) == 2 else value
        for name, value in content.items()
    }
    return {name: array.stored for name, array in found.items() if isinstance(array, _ArrayBuilder)}


class _ArrayUnpickler(TensorUnpickler):
    """Resolves what NumPy arrays and plain containers need; steps over the long byte strings."""

    append: Callable[[Any], None]
    dispatch: ClassVar[dict[int, Any]] = {
        **TensorUnpickler.dispatch,
        # Frames are for readers that have no file below; the length of one may be passed over.
        pickle.FRAME[0]: lambda self: self._file.read(8),
        pickle.BINBYTES[0]: lambda self: self._load_bytes(4),
        pickle.BINBYTES8[0]: lambda self: self._load_bytes(8),
    }

    def __init__(self, file: BinaryIO, path: Path):
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("builtins", "tuple"): tuple,
            ("builtins", "list"): list,
            ("builtins", "dict"): dict,
            ("_codecs", "encode"): self._encode_latin1,
            **{(module, "_reconstruct"): self._reconstruct for module in _MULTIARRAY},
            **{(module, "scalar"): np.float64(0).__reduce__()[0] for module in _MULTIARRAY},
            **{(module, "_frombuffer"): self._from_buffer for module in _NUMERIC},
        }
        super().__init__(file, allowed, _REMEDY)
        self._file = file
        self._size = path.stat().st_size
        self._path = path

    def _load_bytes(self, num_length_bytes: int) -> None:
        length = int.from_bytes(self._file.read(num_length_bytes), "little")
        start = self._file.tell()
        if start + length > self._size:
            raise ValueError(f"a string of {length} bytes at {start} reaches past the end of the file")
        if length < _LONG_BYTES:
            self.append(self._file.read(length))
        else:
            self._file.seek(length, os.SEEK_CUR)
            self.append(_Place(start, length))

    def _reconstruct(self, *_unused: Any) -> _ArrayBuilder:
        return _ArrayBuilder(self._path)

    def _from_buffer(self, buffer: Any, dtype: Any, shape: tuple[int, ...], order: str) -> _ArrayBuilder:
        array = _ArrayBuilder(self._path)
        array.__setstate__((1, shape, dtype, order == "F", buffer))
        return array

    def _encode_latin1(self, text: str, encoding: str = "latin1") -> bytes:
        return text.encode("latin1")
