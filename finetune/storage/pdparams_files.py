"""Tensors of Paddle's `.pdparams` files (and `.pdopt`), one at a time and without running what is in them.

Such a file is one pickle of NumPy arrays by name (`paddle.save`, protocol 4 by default). Two steps read it:
a walk over its instructions finds every long byte string, puts its place in the file instead, and so leaves a
pickle of a few kilobytes; that goes through the unpickler of `pickles`. An array is then mapped into memory where
it lies. Only what protocol 2 stores, bytes spelled as text, is held in memory.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from finetune.errors import UserError
from finetune.storage.arrays import StoredArray, c_strides
from finetune.storage.pickles import TensorUnpickler, load_pickle

_REMEDY = "Save the model as safetensors where you trust it"
_LONG_BYTES = 1024
_LENGTH_BYTES = {"BINBYTES": 4, "BINBYTES8": 8}
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
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
    content = load_pickle(path, lambda path: _ArrayUnpickler(path).load())
    if "UnpackBigParamInfor@@" in content:
        raise UserError(f"{path} splits large tensors in an old way: save the model as safetensors")
    # Paddle stores a tensor as (its inner name, array).
    found = {
        name: value[1] if isinstance(value, tuple) and len(value) == 2 else value
        for name, value in content.items()
    }
    return {name: array.stored for name, array in found.items() if isinstance(array, _ArrayBuilder)}


class _ArrayUnpickler(TensorUnpickler):
    """Resolves what NumPy arrays and plain containers need, and the places that stand for long byte strings."""

    def __init__(self, path: Path):
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
        super().__init__(_without_long_bytes(path), allowed, _REMEDY)
        self._path = path
        self._size = path.stat().st_size

    def persistent_load(self, saved_id: str) -> _Place:
        start, _, size = saved_id.partition(":")
        place = _Place(int(start), int(size))
        if min(place) < 0 or sum(place) > self._size:
            raise ValueError("an array reaches past the end of the file")
        return place

    def _reconstruct(self, *_unused: Any) -> _ArrayBuilder:
        return _ArrayBuilder(self._path)

    def _from_buffer(self, buffer: Any, dtype: Any, shape: tuple[int, ...], order: str) -> _ArrayBuilder:
        array = _ArrayBuilder(self._path)
        array.__setstate__((1, shape, dtype, order == "F", buffer))
        return array

    def _encode_latin1(self, text: str, encoding: str = "latin1") -> bytes:
        return text.encode("latin1")


def _without_long_bytes(path: Path) -> bytes:
    """The pickle with the place of every long byte string instead of it, for `persistent_load`."""
    shortened = io.BytesIO()
    with path.open("rb") as walked, path.open("rb") as copied:
        pending: tuple[str, int, int] | None = None  # instruction, its place, length of its byte string
        for instruction in _instructions(walked):
            if pending:
                _copy_instruction(copied, shortened, pending, end=instruction[1])
            pending = instruction
    shortened.write(pickle.STOP)
    return shortened.getvalue()


def _instructions(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Name, place and length of the byte string of every instruction; the byte strings are stepped over."""
    size = os.fstat(file.fileno()).st_size
    while code := file.read(1):
        position, length = file.tell() - 1, 0
        opcode = _OPCODES.get(code.decode("latin-1"))
        if opcode is None:
            raise ValueError(f"unknown instruction {code!r} at byte {position}")
        if opcode.name in _LENGTH_BYTES:
            length = int.from_bytes(file.read(_LENGTH_BYTES[opcode.name]), "little")
            if file.tell() + length > size:
                raise ValueError(f"{length} bytes are to follow byte {position}, but the file ends before")
            file.seek(length, os.SEEK_CUR)
        elif opcode.arg is not None:
            opcode.arg.reader(file)
        yield opcode.name, position, length
        if code == pickle.STOP:
            return
    raise ValueError("the file ends in the middle")


def _copy_instruction(
    source: BinaryIO, target: io.BytesIO, instruction: tuple[str, int, int], *, end: int
) -> None:
    name, begin, length = instruction
    if name == "FRAME":  # its length would be wrong, and it may be left out
        return
    if length >= _LONG_BYTES:
        place = f"{begin + 1 + _LENGTH_BYTES[name]}:{length}"
        target.write(pickle.BINUNICODE + struct.pack("<I", len(place)) + place.encode() + pickle.BINPERSID)
        return
    source.seek(begin)
    target.write(source.read(end - begin))
