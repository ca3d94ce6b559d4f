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
_USER_DEFINED = 4
_AS_UNUSED = b"\x18\x05"  # field 3 with value 5: of two the last one counts
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


def take_special_names(content: bytes, names: Collection[str]) -> tuple[bytes, dict[str, int]]:
    """The same for those of some names that are user-defined pieces, fast enough for a quarter of a million pieces.

    Args:
        content: The model file's, its fields in the order in which SentencePiece writes them.
        names: What a folder calls special.
    """
    found = []
    for name in names:
        text = name.encode()
        entry = re.compile(
            re.escape(b"\x0a" + _varint(len(text)) + text + b"\x15") + rb"....\x18\x04", re.DOTALL
        )
        if (match := entry.search(content)) is not None:
            content = content[: match.end() - 1] + _AS_UNUSED[1:] + content[match.end() :]
            found.append(name)
    if not found:
        return content, {}
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return content, {name: int(processor.piece_to_id(name)) for name in found}


def _name_of(piece: bytes, known: Collection[str]) -> str | None:
    """The text of a piece that is a name; None for any other piece."""
    text, kind = "", None
    for field, _, inner, end in _fields(piece):
        if field == _TEXT:
            text = piece[inner:end].decode("utf-8", "replace")
        elif field == _TYPE:
            kind = _read_varint(piece, inner)[0]
    if known:
        return text if text in known else None
    return text if kind == _USER_DEFINED and _NAME.fullmatch(text) else None


def _fields(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Number of each field, and where it starts, where its value starts, and where it ends."""
    place = 0
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
