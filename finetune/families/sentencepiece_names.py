"""Pieces of a SentencePiece model that are names of tokens, such as ``<eoa>``: no text is spelled with them.

Publishers add them as "user-defined" pieces, which SentencePiece finds in any text. Here they are special tokens, as
those of other tokenizers are: a template may write them, a sample's text may not. The model file is read by hand, as a
protocol buffer: the generated classes would clash with PaddleNLP's copy of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

_NAME = re.compile(r"[<\[][^\s<>\[\]]{2,}[>\]]")
_PIECES, _TEXT, _TYPE = 1, 1, 3  # fields of ModelProto and of SentencePiece in it
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5
_PIECE_TAG = 0x0A
_AS_USER_DEFINED = b"\x18\x04"
_AS_UNUSED = b"\x18\x05"  # field 3 with value 5: of two the last one counts
BLANK_SIGN = "\u2581"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def take_names(content: bytes, known: Collection[str] = ()) -> tuple[bytes, dict[str, int]]:
    """A serialised model that spells no text with its names, and the ids of these names.

    Args:
        content: The model file's.
        known: These are the names, whatever their kind; without them user-defined pieces that look like names are.

    Raises:
        ValueError: It is no protocol buffer.
    """
    parts: list[bytes] = []
    names: dict[str, int] = {}
    number, copied = 0, 0
    for field, start, inner, end in _fields(content):
        if field != _PIECES:
            continue
        piece = content[inner:end]
        text = _name_of(piece, known)
        if text is not None:
            names[text] = number
            changed = piece + _AS_UNUSED
            parts += [content[copied:start], b"\x0a", _varint(len(changed)), changed]
            copied = end
        number += 1
    return b"".join([*parts, content[copied:]]), names


def take_user_defined(content: bytes, *, keeps_runs: bool = False) -> tuple[bytes, dict[str, int]]:
    """A model that finds none of its user-defined pieces in text by itself, and their ids.

    What transformers makes of such a vocabulary cuts texts at these pieces as they are written, and merges what lies
    between. Merging gives such a piece too, where a blank became the sign in it: it is an ordinary piece of the model
    that is returned, and others are unused.

    Args:
        content: The model file's.
        keeps_runs: Whether pieces that repeat one character, which no other piece that is taken has, stay as they are:
            line breaks are found faster so. For vocabularies that put no blank in front of texts.

    Raises:
        ValueError: It is no protocol buffer.
    """
    found = {text: place for text, place in _user_defined(content).items() if text}
    if keeps_runs:
        runs = {text for text in found if len(set(text)) == 1 and BLANK_SIGN not in text}
        others = set().union(*(set(text) for text in found if text not in runs))
        found = {text: place for text, place in found.items() if text not in runs or text[0] in others}
    changed = bytearray(content)
    for text, (_, end) in found.items():
        changed[end - 1] = _NORMAL if BLANK_SIGN in text else _UNUSED
    return bytes(changed), {text: number for text, (number, _) in found.items()}


def _user_defined(content: bytes) -> dict[str, tuple[int, int]]:
    """The number of each user-defined piece and where it ends: there its type stands.

    A quarter of a million pieces take a quarter of a second.
    """
    found: dict[str, tuple[int, int]] = {}
    number = place = 0
    while place < len(content):
        field, inner, end = _PIECES, place + 2, 0
        if content[place] == _PIECE_TAG and place + 1 < len(content) and content[place + 1] < 0x80:
            end = inner + content[place + 1]
        else:
            field, _, inner, end = next(_fields(content, place))
        if field == _PIECES:
            if content[end - 2 : end] == _AS_USER_DEFINED and (
                text := _name_of(content[inner:end], any_user=True)
            ):
                found[text] = number, end
            number += 1
        place = end
    return found


def _name_of(piece: bytes, known: Collection[str] = (), *, any_user: bool = False) -> str | None:
    """The text of a piece that is a name, or of any that is user-defined; None for other pieces."""
    text, kind = "", None
    for field, _, inner, end in _fields(piece):
        if field == _TEXT:
            text = piece[inner:end].decode("utf-8", "replace")
        elif field == _TYPE:
            kind = _read_varint(piece, inner)[0]
    if known:
        return text if text in known else None
    return text if kind == _USER_DEFINED and (any_user or _NAME.fullmatch(text)) else None


def _fields(content: bytes, place: int = 0) -> Iterator[tuple[int, int, int, int]]:
    """Number of each field from a place on, and where it starts, where its value starts, and where it ends."""
    while place < len(content):
        start = place
        tag, place = _read_varint(content, place)
        inner = place
        kind = tag & 7
        if kind == _VARINT:
            place = _read_varint(content, place)[1]
        elif kind == _BYTES:
            length, inner = _read_varint(content, place)
            place = inner + length
        elif kind in (_FIXED64, _FIXED32):
            place += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"no field has the kind {kind}")
        if place > len(content):
            raise ValueError("it ends in the middle of a field")
        yield tag >> 3, start, inner, place


def _read_varint(content: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the place behind it."""
    value = shift = 0
    while True:
        if place >= len(content):
            raise ValueError("it ends in the middle of a number")
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
