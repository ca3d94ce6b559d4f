"""Plain values as bytes and back, for what ranks tell each other beside tensors.

JSON with a fixed schema in place of pickles: what comes in can become a number, a text, a list, a tuple, a dict or a
path, and never calls anything. Lists, numbers, texts and None stand as they are; what JSON lacks is an object with one
key:

    {"tuple": [...]}    {"dict": [[key, value], ...]}    {"path": "..."}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_AS_THEY_ARE = frozenset({type(None), bool, int, float, str})


def encode_value(value: Any) -> bytes:
    """A value as bytes.

    Raises:
        TypeError: It is, or holds, something else than None, numbers, texts, lists, tuples, dicts and paths.
    """
    return json.dumps(_to_json(value), separators=(",", ":")).encode("ascii")


def decode_value(data: bytes) -> Any:
    """The value of what `encode_value` made, of equal types.

    Raises:
        ValueError: The bytes are something else.
    """
    try:
        return _from_json(json.loads(data))
    except (RecursionError, TypeError) as error:
        raise ValueError(f"another process sent what is no plain value: {error}") from None


def _to_json(value: Any) -> Any:
    if type(value) in _AS_THEY_ARE:
        return value
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [_to_json(each) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[_to_json(key), _to_json(each)] for key, each in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):  # NumPy's
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"a {type(value).__name__} is no plain value that processes can tell each other")


def _from_json(value: Any) -> Any:
    if type(value) in _AS_THEY_ARE:
        return value
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    if len(value) != 1 or (kind := next(iter(value))) not in _KINDS:
        raise ValueError(
            f"another process sent an object with the keys {sorted(value)[:5]}, which is no plain value"
        )
    return _KINDS[kind](value[kind])


_KINDS: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda items: tuple(_from_json(each) for each in items),
    "dict": lambda items: {_from_json(key): _from_json(each) for key, each in items},
    "path": Path,
}
