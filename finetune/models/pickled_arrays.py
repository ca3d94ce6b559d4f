"""Tensors of PaddleNLP's `.pdparams` files, one at a time and without running what is in them.

Such a file is one pickle of NumPy arrays by name (`paddle.save`, protocol 4 by default). Two steps read it:
a walk over its instructions finds every long byte string, puts its place in the file instead, and so leaves a
pickle of a few kilobytes; that goes through an unpickler that knows NumPy arrays and containers and refuses
everything else, so that a folder from a stranger cannot run code. An array is then mapped into memory where
it lies. Only what protocol 2 stores, bytes spelled as text, is held in memory.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from finetune.errors import UserError

_LONG_BYTES = 1024
_LENGTH_BYTES = {"BINBYTES": 4, "BINBYTES8": 8}
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}


class _Place(NamedTuple):
    """A byte string that stayed in the file."""

    start: int
    size: int


class PickledArray:
    """An array of a file. Only `__setstate__`, which checks, can fill it from a pickle.

    Attributes:
        path: The file.
        dtype: Element type; bfloat16 is uint16.
        shape: Sizes.
    """

    __slots__ = ("_fortran", "_raw", "dtype", "path", "shape")

    def __init__(self, path: Path):
        self.path = path
        self.dtype = np.dtype(np.float32)
        self.shape: tuple[int, ...] = (0,)
        self._fortran = False
        self._raw: bytes | bytearray | _Place = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes what NumPy pickles of an array: version, shape, element type, order and bytes.

        Raises:
            ValueError: The parts do not belong together.
        """
        _version, shape, dtype, fortran, raw = state
        if (
            not isinstance(dtype, np.dtype)
            or dtype.hasobject
            or not isinstance(raw, bytes | bytearray | _Place)
        ):
            raise ValueError("an array holds something else than numbers")
        size = raw.size if isinstance(raw, _Place) else len(raw)
        if min(shape, default=0) < 0 or int(np.prod(shape, dtype=np.int64)) * dtype.itemsize != size:
            raise ValueError(f"an array of shape {list(shape)} has {size} bytes")
        self.shape, self.dtype, self._fortran, self._raw = tuple(shape), dtype, bool(fortran), raw

    def read(self) -> np.ndarray:
        """The array as stored, mapped read-only where it is large."""
        order: Any = "F" if self._fortran else "C"
        if isinstance(self._raw, _Place):
            return np.memmap(
                self.path, dtype=self.dtype, mode="r", offset=self._raw.start, shape=self.shape, order=order
            )
        return np.frombuffer(self._raw, self.dtype).reshape(self.shape, order=order)


def read_pdparams(path: Path) -> dict[str, PickledArray]:
    """The arrays of a `.pdparams` file, by name.

    Raises:
        UserError: It holds anything but arrays and plain containers, or is damaged.
    """
    try:
        content = _ArrayUnpickler(io.BytesIO(_without_long_bytes(path)), path).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except (EOFError, ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    if "UnpackBigParamInfor@@" in content:
        raise UserError(f"{path} splits large tensors in an old way: save the model as safetensors")
    return dict(_arrays(content))


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
    source: Any, target: io.BytesIO, instruction: tuple[str, int, int], *, end: int
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


def _arrays(content: dict[str, Any]) -> Iterator[tuple[str, PickledArray]]:
    for name, value in content.items():
        # Paddle stores a tensor as (its inner name, array).
        array = value[1] if isinstance(value, tuple) and len(value) == 2 else value
        if isinstance(array, PickledArray):
            yield name, array


class _ArrayUnpickler(pickle.Unpickler):
    """Resolves only what NumPy arrays and plain containers need."""

    def __init__(self, file: io.BytesIO, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("builtins", "tuple"): tuple,
            ("builtins", "list"): list,
            ("builtins", "dict"): dict,
            ("_codecs", "encode"): _encode_latin1,
        }
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return self._reconstruct
            if name == "scalar":
                return np.float64(0).__reduce__()[0]
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return self._from_buffer
        if (module, name) in allowed:
            return allowed[module, name]
        raise pickle.UnpicklingError(
            f"it contains {module}.{name}, which could run code; only arrays are read. Save the model as "
            "safetensors where you trust it"
        )

    def persistent_load(self, saved_id: str) -> _Place:
        start, _, size = saved_id.partition(":")
        place = _Place(int(start), int(size))
        if place.start < 0 or place.start + place.size > self._path.stat().st_size:
            raise ValueError("an array reaches past the end of the file")
        return place

    def _reconstruct(self, *_unused: Any) -> PickledArray:
        return PickledArray(self._path)

    def _from_buffer(self, buffer: Any, dtype: Any, shape: tuple[int, ...], order: str) -> PickledArray:
        array = PickledArray(self._path)
        array.__setstate__((1, shape, dtype, order == "F", buffer))
        return array


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")
