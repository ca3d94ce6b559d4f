"""Ways to damage a file: strategies for hypothesis that draw changes, and what carries them out.

A change says where (a share of what there is), how, and with what, so that the same change fits any file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

DEEP = 50_000

_NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 10**18, 10**400, 1e18, 1e308, -1e308, 5e-324, 0.5, -0.0]),
    st.integers(),
    st.floats(),
)  # fmt: skip
_TEXTS = st.one_of(
    st.sampled_from(["", " ", "null", "true", "0", "1e999", "\0", "a\0b", "\ud800", "\udcff", "n" * 5000, "a/" * 3000,
                     "../x", ".", "{{", "{% for %}", "(", "[a-", "**", "\n", "\u2028", "é", "中文", "😀", "-1", "NaN"]),
    st.text(max_size=20),
    st.text(st.characters(), max_size=8),  # halves of surrogate pairs, too
)  # fmt: skip
_PLAIN = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
VALUES = st.recursive(
    _PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(_TEXTS.filter(lambda t: len(t) < 99), inner, max_size=3)
    ),
    max_leaves=6,
)
"""Anything that JSON can say, and some that it cannot."""

PLACES = st.floats(0, 1, exclude_max=True)
"""A share of what there is."""

JSON_CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "set", "remove", "add", "type", "scale", "double"]), PLACES, VALUES),
    min_size=1,
    max_size=3,
)
BYTE_CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "remove", "cut", "repeat", "swap"]),
        PLACES,
        st.binary(max_size=16),
    ),
    min_size=1,
    max_size=3,
)
WHOLE_CONTENTS = st.sampled_from(
    [b"", b"null", b"[]", b"{}", b'"text"', b"7", b"[" * DEEP, b'{"a":' * DEEP, b"\xff\xfe\x00", b"\xef\xbb\xbf", bytes(256),
     b'{"a": NaN}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}', b"{",
     b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"]
)  # fmt: skip


def change_json(document: Any, changes: list[tuple[str, float, Any]]) -> Any:
    """A copy of a document with changes at places of any depth."""
    document = copy.deepcopy(document)
    for kind, share, value in changes:
        places = list(_places(document))
        if not places:
            return value
        holder, key = places[int(share * len(places))]
        if kind == "remove":
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[value if isinstance(value, str) else str(value)] = value
        elif kind == "type":
            holder[key] = _other_type(holder[key])
        elif kind == "scale" and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * 2 + 1
        elif kind == "double":
            holder[key] = [holder[key], holder[key]]
        else:
            holder[key] = value
    return document


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _other_type(value: Any) -> Any:
    if isinstance(value, Mapping):
        return list(value)
    return str(value) if not isinstance(value, str) else [value]


def dump_json(value: Any) -> bytes:
    """The bytes of a document, also of one that no other program would write."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def change_bytes(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """A copy of a content with changes at shares of its length."""
    for kind, share, given in changes:
        place = int(share * len(content))
        width = max(len(given), 1)
        if kind == "flip":
            content = (
                content[:place]
                + bytes(byte ^ 0x80 for byte in content[place : place + width])
                + content[place + width :]
            )
        elif kind == "set":
            content = content[:place] + given + content[place + len(given) :]
        elif kind == "insert":
            content = content[:place] + given + content[place:]
        elif kind == "remove":
            content = content[:place] + content[place + width :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "repeat":
            content = content[:place] + content[place : place + width] * 50 + content[place + width :]
        else:
            content = content[place:] + content[:place]
    return content
