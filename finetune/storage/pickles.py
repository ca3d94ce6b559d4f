"""Pickles of tensors, read without running what is in them.

The two kinds of weight file that are pickles, Paddle's and PyTorch's, share the rules here. A pickle is a program for
a small machine with a stack, and any machine that can call what the program names can be misused: NumPy's own types
reach memory they must not once a pickle sets their state. So this machine knows the instructions that files of
tensors have, and it calls nothing of the file's choosing:

    a name          stands for a constant or for a `Constructor` of ours; every other name is refused
    REDUCE          runs a `Constructor`, which checks what it is given
    BUILD           is refused but for the objects of ours that ask for a state (`take_state`)
    a key           is text or a small number: tuples can be nested so that hashing one never ends
    a long string   of bytes stays in the file and is a `Place`

Work and memory grow with the size of the file, not with what it claims: instructions and copied elements are
counted (`pickle_values`), and lengths are compared with the file before anything is read.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import UserError
from finetune.storage.pickle_values import (  # fmt: skip
    MAX_AXES,
    MAX_STEPS,
    BoundedContainers,
    Constructor,
    Place,
    Stateful,
    list_of,
    set_item,
)

_MAX_DEPTH = 64  # of what is being built; files of tensors have about 5
_MAX_NAME_BYTES = 256
_MAX_INTEGER_BYTES = 9  # 64 bits and a sign
_LONG_BYTES = 1024
_MAX_MESSAGE = 200
_DAMAGE = (
    EOFError, ValueError, IndexError, TypeError, KeyError, AttributeError, struct.error, NotImplementedError,
    OverflowError, MemoryError, zipfile.BadZipFile,
)  # fmt: skip
_INSTRUCTIONS = {opcode.code.encode("latin1"): opcode.name for opcode in pickletools.opcodes}


class PickleReader:
    """Runs the instructions of one pickle.

    Args:
        file: Holds the pickle, from its place on.
        num_bytes: Size of the file.
        allowed: (module, name) -> a constant or a `Constructor`, beside those of plain containers.
        remedy: What to do with a file that holds anything else.
    """

    def __init__(self, file: BinaryIO, num_bytes: int, allowed: Mapping[tuple[str, str], Any], remedy: str):
        self._file = file
        self._num_bytes = num_bytes
        self._allowed = {**BoundedContainers(num_bytes).constructors(), **allowed}
        self._remedy = remedy
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each open mark
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """What the pickle holds.

        Raises:
            UnpicklingError: It asks for something that is not read here.
            Exception: One of those that `load_pickle` knows: it is damaged.
        """
        read, steps = self._file.read, _STEPS
        for _ in range(MAX_STEPS):
            code = read(1)
            step = steps.get(code)
            if step is not None:
                step(self)
            elif code == pickle.STOP:
                return self._stack.pop()
            elif not code:
                raise EOFError("it ends too early")
            else:
                name = _INSTRUCTIONS.get(code, f"number {code[0]}")
                raise self.refusal(f"it contains the instruction {name}, which no file of tensors needs")
        raise self.refusal(f"it has more than {MAX_STEPS} instructions")

    def refusal(self, reason: str) -> pickle.UnpicklingError:
        """The error for a pickle that is not read, with the remedy."""
        return pickle.UnpicklingError(f"{reason}. {self._remedy}")

    def load_persistent(self, saved_id: Any) -> Any:
        """What stands for an object outside the pickle; none here.

        Raises:
            UnpicklingError: Always.
        """
        raise self.refusal("it names persistent objects, which are not in the file")

    # Instructions

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _read(self, num_bytes: int) -> bytes:
        """So many bytes of the file, which the next instruction comes after."""
        if num_bytes <= self._num_bytes:
            content = self._file.read(num_bytes)
            if len(content) == num_bytes:
                return content
        raise EOFError(f"a string of {num_bytes} bytes reaches past the end of the file")

    def _read_number(self, num_bytes: int) -> int:
        return int.from_bytes(self._read(num_bytes), "little")

    def _load_integer(self) -> None:
        size = self._read_number(1)
        if size > _MAX_INTEGER_BYTES:
            raise ValueError(f"an integer of {size} bytes")
        self._push(int.from_bytes(self._read(size), "little", signed=True))

    def _load_text(self, num_length_bytes: int, encoding: str = "utf-8") -> None:
        self._stack.append(str(self._read(self._read_number(num_length_bytes)), encoding))

    def _load_bytes(self, num_length_bytes: int) -> None:
        length = self._read_number(num_length_bytes)
        if length < _LONG_BYTES:
            self._push(self._read(length))
            return
        start = self._file.tell()
        if start + length > self._num_bytes:
            raise ValueError(f"a string of {length} bytes at {start} reaches past the end of the file")
        self._file.seek(length, os.SEEK_CUR)
        self._push(Place(start, length))

    def _mark(self) -> None:
        if len(self._marked) >= _MAX_DEPTH:
            raise self.refusal(f"it is nested more than {_MAX_DEPTH} deep")
        self._marked.append(self._stack)
        self._stack = []

    def _pop_marked(self) -> list[Any]:
        """What was pushed since the last mark."""
        items = self._stack
        self._stack = self._marked.pop()
        return items

    def _load_last(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count:
            raise IndexError("a tuple of more than there is")
        self._stack[-count:] = [items]

    def _append(self) -> None:
        value = self._stack.pop()
        list_of(self._stack[-1]).append(value)

    def _append_all(self) -> None:
        items = self._pop_marked()
        list_of(self._stack[-1]).extend(items)

    def _set(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        set_item(self._stack[-1], key, value)

    def _set_all(self) -> None:
        items = self._pop_marked()
        for key, value in zip(items[::2], items[1::2], strict=True):
            set_item(self._stack[-1], key, value)

    # The four below are every second instruction of a file, and call nothing they can do without.

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _put(self) -> None:
        self._memo[self._file.read(1)[0]] = self._stack[-1]

    def _get(self) -> None:
        self._stack.append(self._memo[self._file.read(1)[0]])

    def _load_byte(self) -> None:
        self._stack.append(self._file.read(1)[0])

    def _put_long(self) -> None:
        self._memo[self._read_number(4)] = self._stack[-1]

    def _load_global(self) -> None:
        module, name = (self._file.readline(_MAX_NAME_BYTES) for _ in range(2))
        if not (module.endswith(b"\n") and name.endswith(b"\n")):
            raise ValueError(f"a name of more than {_MAX_NAME_BYTES} bytes")
        self._load_name(module[:-1].decode(), name[:-1].decode())

    def _load_stacked_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("a name that is no text")
        self._load_name(module, name)

    def _load_name(self, module: str, name: str) -> None:
        if (module, name) not in self._allowed:
            shown = ascii(f"{module}.{name}")[1:-1][:_MAX_MESSAGE]
            raise self.refusal(
                f"it contains {shown}, which could run code or is unknown here; only tensors are read"
            )
        self._push(self._allowed[module, name])

    def _reduce(self) -> None:
        arguments, constructor = self._stack.pop(), self._stack.pop()
        if not isinstance(constructor, Constructor) or not isinstance(arguments, tuple):
            raise self.refusal(f"it calls a {type(constructor).__name__}")
        if len(arguments) > MAX_AXES:
            raise ValueError(f"a call with {len(arguments)} arguments")
        self._push(constructor.build(*arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Stateful):
            target.take_state(state)
        elif not isinstance(target, dict):  # attributes of a dictionary are no tensors and are left out
            raise self.refusal(f"it sets the state of a {type(target).__name__}")


_STEPS: dict[bytes, Callable[[PickleReader], Any]] = {
    pickle.PROTO: lambda self: self._read(1),
    # Frames are for readers that have no file below; the length of one may be passed over.
    pickle.FRAME: lambda self: self._read(8),
    pickle.POP: lambda self: self._stack.pop(),
    pickle.NONE: lambda self: self._stack.append(None),
    pickle.NEWTRUE: lambda self: self._stack.append(True),
    pickle.NEWFALSE: lambda self: self._stack.append(False),
    pickle.BININT: lambda self: self._push(int.from_bytes(self._read(4), "little", signed=True)),
    pickle.BININT1: PickleReader._load_byte,
    pickle.BININT2: lambda self: self._push(self._read_number(2)),
    pickle.LONG1: PickleReader._load_integer,
    pickle.BINFLOAT: lambda self: self._push(struct.unpack(">d", self._read(8))[0]),
    pickle.SHORT_BINSTRING: lambda self: self._load_text(1, "ascii"),
    pickle.BINSTRING: lambda self: self._load_text(4, "ascii"),
    pickle.SHORT_BINUNICODE: lambda self: self._load_text(1),
    pickle.BINUNICODE: lambda self: self._load_text(4),
    pickle.SHORT_BINBYTES: lambda self: self._load_bytes(1),
    pickle.BINBYTES: lambda self: self._load_bytes(4),
    pickle.BINBYTES8: lambda self: self._load_bytes(8),
    pickle.BYTEARRAY8: lambda self: self._load_bytes(8),
    pickle.EMPTY_TUPLE: lambda self: self._stack.append(()),
    pickle.TUPLE1: lambda self: self._load_last(1),
    pickle.TUPLE2: lambda self: self._load_last(2),
    pickle.TUPLE3: lambda self: self._load_last(3),
    pickle.MARK: PickleReader._mark,
    pickle.TUPLE: lambda self: self._push(tuple(self._pop_marked())),
    pickle.EMPTY_LIST: lambda self: self._stack.append([]),
    pickle.APPEND: PickleReader._append,
    pickle.APPENDS: PickleReader._append_all,
    pickle.EMPTY_DICT: lambda self: self._stack.append({}),
    pickle.SETITEM: PickleReader._set,
    pickle.SETITEMS: PickleReader._set_all,
    pickle.MEMOIZE: PickleReader._memoize,
    pickle.BINPUT: PickleReader._put,
    pickle.LONG_BINPUT: PickleReader._put_long,
    pickle.BINGET: PickleReader._get,
    pickle.LONG_BINGET: lambda self: self._push(self._memo[self._read_number(4)]),
    pickle.GLOBAL: PickleReader._load_global,
    pickle.STACK_GLOBAL: PickleReader._load_stacked_global,
    pickle.REDUCE: PickleReader._reduce,
    pickle.BUILD: PickleReader._build,
    pickle.BINPERSID: lambda self: self._push(self.load_persistent(self._stack.pop())),
}


def load_pickle(path: Path, load: Callable[[], Any]) -> dict[str, Any]:
    """What a file holds by name.

    Args:
        path: The file, for messages.
        load: Reads it through a `PickleReader`.

    Raises:
        UserError: It is damaged, holds anything but a dictionary, or names an object that could run code.
    """
    try:
        content = load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): copy it there") from None
    except _DAMAGE as error:
        reason = str(error)[:_MAX_MESSAGE]  # before anything is put together with it: it may be long
        raise UserError(f"{path} is damaged ({type(error).__name__}: {reason}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return {str(name): value for name, value in content.items()}
