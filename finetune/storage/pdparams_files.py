"""Tensors of Paddle's `.pdparams` files (and `.pdopt`), one at a time and without running what is in them.

Such a file is one pickle of NumPy arrays by name (`paddle.save`, protocol 4 by default). The reader of `pickles`
goes over it, and where a long byte string comes it notes the place and steps over it. An array is then mapped into
memory where it lies. Only what protocol 2 stores, bytes spelled as text, is held in memory.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from finetune.errors import UserError
from finetune.storage.arrays import StoredArray, c_strides
from finetune.storage.files import open_file
from finetune.storage.pickle_values import MAX_AXES, Constructor, Place, Stateful
from finetune.storage.pickles import PickleReader, load_pickle

_REMEDY = "Save the model as safetensors where you trust it"
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
# Numbers of a fixed size. Objects, texts, dates and structures are none.
_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
_MAX_SIZE = 2**63  # of an array in bytes


class _ElementType(Stateful):
    """Stands for NumPy's type of that code."""

    __slots__ = ("code", "is_big_endian")

    def __init__(self, code: Any, *_unused: Any):
        if code not in _CODES:
            raise pickle.UnpicklingError(f"an array holds something else than numbers. {_REMEDY}")
        self.code: str = code
        self.is_big_endian = False

    def take_state(self, state: Any) -> None:
        """Takes what NumPy pickles of a type of numbers: version, byte order, and nothing in the rest.

        Raises:
            ValueError: It is more than that.
        """
        _version, order, structure, names, fields, *_sizes = state
        if order not in ("<", ">", "|", "=") or any(each is not None for each in (structure, names, fields)):
            raise ValueError("an element type is described in an unknown way")
        self.is_big_endian = order == ">"


class _Array(Stateful):
    """Stands for an array. Only `take_state`, which checks, can fill it.

    Attributes:
        stored: Where it lies; None before it is filled.
    """

    __slots__ = ("_reader", "stored")

    def __init__(self, reader: _ArrayReader):
        self._reader = reader
        self.stored: StoredArray | None = None

    def take_state(self, state: Any) -> None:
        """Takes what NumPy pickles of an array: version, shape, element type, order and bytes.

        Raises:
            ValueError: The parts do not belong together.
            UnpicklingError: Its numbers are of a kind that is not read.
        """
        _version, shape, element_type, is_fortran, raw = state
        if not isinstance(element_type, _ElementType) or not isinstance(raw, bytes | Place):
            raise ValueError("an array holds something else than numbers")
        if element_type.is_big_endian:
            raise self._reader.refusal("its numbers are big-endian")
        # A type of its own: the pickle could still change the one that it has built.
        dtype = np.dtype(element_type.code)
        size = raw.size if isinstance(raw, Place) else len(raw)
        _check_shape(shape, dtype, size)
        strides = c_strides(shape[::-1], dtype.itemsize)[::-1] if is_fortran else None
        stored = StoredArray(self._reader.path, dtype, shape, strides=strides)
        if isinstance(raw, Place):
            self.stored = stored._replace(start=raw.start)
        else:
            self.stored = stored._replace(content=raw)


def _check_shape(shape: Any, dtype: np.dtype[Any], size: int) -> None:
    is_shape = isinstance(shape, tuple) and len(shape) <= MAX_AXES
    if not is_shape or not all(isinstance(each, int) and each >= 0 for each in shape):
        raise ValueError("the shape of an array is no tuple of sizes")
    # The product may not go beyond 64 bits on the way either, as where a 0 comes last.
    if math.prod(max(each, 1) for each in shape) * dtype.itemsize >= _MAX_SIZE:
        raise ValueError(f"an array has shape {list(shape)}")
    if math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"an array of shape {list(shape)} has {size} bytes")


def read_pdparams(path: Path) -> dict[str, StoredArray]:
    """The arrays of a `.pdparams` file, by name.

    Raises:
        UserError: It holds anything but arrays and plain containers, or is damaged.
    """
    with open_file(path) as file:
        content = load_pickle(path, _ArrayReader(file, path).load)
    if "UnpackBigParamInfor@@" in content:
        raise UserError(f"{path} splits large tensors in an old way: save the model as safetensors")
    # Paddle stores a tensor as (its inner name, array).
    found = {
        name: value[1] if isinstance(value, tuple) and len(value) == 2 else value
        for name, value in content.items()
    }
    arrays = {name: value.stored for name, value in found.items() if isinstance(value, _Array)}
    if not arrays:
        raise UserError(f"{path} holds no tensors: put the right file there")
    if empty := [name for name, stored in arrays.items() if stored is None]:
        raise UserError(f"{path} is damaged (array {empty[0]!r} has no content): copy it again")
    return {name: stored for name, stored in arrays.items() if stored is not None}


class _ArrayReader(PickleReader):
    """Knows what NumPy arrays need.

    Attributes:
        path: The file.
    """

    def __init__(self, file: BinaryIO, path: Path):
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): "numpy.ndarray",
            ("numpy", "dtype"): Constructor(_ElementType),
            **{(module, "_reconstruct"): Constructor(self._reconstruct) for module in _MULTIARRAY},
            **{(module, "scalar"): Constructor(self._skip_scalar) for module in _MULTIARRAY},
            **{(module, "_frombuffer"): Constructor(self._from_buffer) for module in _NUMERIC},
        }
        super().__init__(file, path.stat().st_size, allowed, _REMEDY)
        self.path = path

    def _reconstruct(self, *_unused: Any) -> _Array:
        return _Array(self)

    def _from_buffer(self, buffer: Any, element_type: Any, shape: Any, order: Any) -> _Array:
        array = _Array(self)
        array.take_state((1, shape, element_type, order == "F", buffer))
        return array

    def _skip_scalar(self, *_unused: Any) -> None:
        """A single number, as in the state of an optimizer: no tensor."""
