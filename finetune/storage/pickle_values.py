"""What a pickle may build (`finetune.storage.pickles`): plain containers, places in the file, and objects of ours."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_STEPS = 4_000_000
"""Instructions, and elements that are copied; a tensor takes about 40."""
MAX_AXES = 32
"""Of an array, as in NumPy."""
_MAX_KEY = 2**32


class Place(NamedTuple):
    """A byte string that stayed in the file."""

    start: int
    size: int


class Constructor(NamedTuple):
    """What a pickle may call by a name: `build` is given its arguments, and checks them."""

    build: Callable[..., Any]


class Stateful:
    """Base of what a pickle may give a state after it was built."""

    __slots__ = ()

    def take_state(self, state: Any) -> None:
        """Checks and takes the state; the base has none.

        Raises:
            ValueError: The state is not one of this object.
            UnpicklingError: It is refused.
        """
        raise NotImplementedError


def list_of(target: Any) -> list[Any]:
    """The list that an instruction adds to.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(target, list):
        raise ValueError(f"a {type(target).__name__} is used as a list")
    return target


def set_item(target: Any, key: Any, value: Any) -> None:
    """Puts a value into a dictionary.

    Raises:
        ValueError: It is none, or the key is neither text nor a small number.
    """
    if not isinstance(target, dict):
        raise ValueError(f"a {type(target).__name__} is used as a dictionary")
    if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < _MAX_KEY):
        raise ValueError(f"a dictionary has a {type(key).__name__} as key")
    target[key] = value


class BoundedContainers:
    """Constructors of plain containers. A few bytes can ask for a long copy many times, so they count.

    Args:
        num_bytes: What the strings that are copied may have together: the size of the file.
    """

    def __init__(self, num_bytes: int):
        self._num_elements = 0
        self._num_bytes = num_bytes

    def constructors(self) -> dict[tuple[str, str], Constructor]:
        """By module and name."""
        builders: dict[str, Callable[..., Any]] = {
            "tuple": self._make_tuple,
            "list": self._make_list,
            "dict": self._make_dict,
            "bytes": _make_no_bytes,
        }
        found = {
            (module, name): Constructor(builder)
            for module in ("builtins", "__builtin__")
            for name, builder in builders.items()
        }
        return {
            **found,
            ("collections", "OrderedDict"): Constructor(self._make_dict),
            ("_codecs", "encode"): Constructor(self._encode_latin1),
        }

    def _make_tuple(self, items: Any = ()) -> tuple[Any, ...]:
        return tuple(self._make_list(items))

    def _make_list(self, items: Any = ()) -> list[Any]:
        if not isinstance(items, list | tuple):
            raise ValueError(f"a list is made of a {type(items).__name__}")
        self._count(items)
        return list(items)

    def _make_dict(self, items: Any = ()) -> dict[Any, Any]:
        if isinstance(items, dict):
            self._count(items)
            return dict(items)
        made: dict[Any, Any] = {}
        for pair in self._make_list(items):
            if not isinstance(pair, list | tuple):
                raise ValueError(f"a dictionary is made of a {type(pair).__name__}")
            key, value = pair
            set_item(made, key, value)
        return made

    def _count(self, items: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> None:
        self._num_elements += len(items)
        if self._num_elements > MAX_STEPS:
            raise pickle.UnpicklingError(f"it copies more than {MAX_STEPS} elements")

    def _encode_latin1(self, text: Any, _encoding: Any = "latin1") -> bytes:
        """Protocol 2 spells bytes as text."""
        if not isinstance(text, str):
            raise ValueError(f"bytes are made of a {type(text).__name__}")
        self._num_bytes -= len(text)
        if self._num_bytes < 0:
            raise ValueError("its strings are longer than the file")
        return text.encode("latin1")


def _make_no_bytes() -> bytes:
    """Protocol 2 spells no bytes at all as a call without arguments."""
    return b""
