"""Files in UTF-8 or another encoding, as bytes that can be divided into lines."""

from __future__ import annotations

import codecs
import io
from pathlib import Path
from typing import BinaryIO

from finetune.storage.files import open_file

UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
_HEAD_BYTES = 4096


class EncodingError(ValueError):
    """A whole file is no text in the encoding that it should have."""


def normalise_encoding(name: str) -> str:
    """Python's own name of an encoding; GB 2312 and GBK are read as GB 18030, which contains both.

    Raises:
        LookupError: There is none of that name, or it is none of texts.
    """
    found = codecs.lookup(name)
    if not found._is_text_encoding:
        raise LookupError(f"{name} is no encoding of texts")
    return {"gb2312": "gb18030", "gbk": "gb18030", "utf-8-sig": "utf-8"}.get(found.name, found.name)


def is_wide(encoding: str) -> bool:
    """Whether a line feed is more than one byte, so that such a file can only be read as a whole."""
    return encoding in _WIDE


def open_lines(file: Path, encoding: str) -> tuple[BinaryIO, str]:
    """A file as bytes with line feeds of one byte, and the encoding of these bytes.

    Args:
        file: The file.
        encoding: From `normalise_encoding`.

    Raises:
        UserError: It cannot be read.
        EncodingError: It is no text in a wide encoding.
    """
    if not is_wide(encoding):
        return open_file(file), encoding
    try:
        with open_file(file) as stream:
            text = stream.read().decode(encoding)
    except UnicodeDecodeError as error:
        raise EncodingError(
            f"not {encoding} (at byte {error.start + 1}): check the setting encoding"
        ) from None
    return io.BytesIO(text.removeprefix("\ufeff").encode("utf-8", "surrogatepass")), "utf-8"


def find_wide_encoding(file: Path) -> str | None:
    """The wide encoding that a file seems to have, by its first bytes; None where it does not.

    Raises:
        UserError: It cannot be read.
    """
    with open_file(file) as stream:
        head = stream.read(_HEAD_BYTES)
    if head.startswith(_UTF16_BOMS):
        return "utf-16"
    if 4 * head.count(0) > len(head):
        return "utf-16-le" if head[1::2].count(0) > head[0::2].count(0) else "utf-16-be"
    return None


def describe_wide(encoding: str) -> str:
    """What to do about a file that seems to have a wide encoding."""
    return f"not UTF-8 but, by its first bytes, {encoding.upper()}: set encoding to {encoding}, or save it as UTF-8"


def describe_broken(content: bytes, encoding: str = "utf-8") -> str:
    """Why bytes are no text, and what to do, for a message.

    Args:
        content: A line, or a part of one.
        encoding: What it was expected to be.
    """
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        place = f"0x{content[error.start]:02x} at byte {error.start + 1} of the line"
    else:
        place = "a character that is none"
    if encoding != "utf-8":
        return f"not {encoding} ({place}; check the setting encoding)"
    if looks_like_gbk(content):
        return f"not UTF-8 ({place}; looks like GBK: set encoding to gbk, or save it as UTF-8)"
    return f"not UTF-8 ({place}; save it as UTF-8, or set encoding)"


def looks_like_gbk(content: bytes) -> bool:
    """Whether bytes are Chinese text in GB 18030: nearly all that is no ASCII is Chinese there."""
    try:
        text = content.decode("gb18030")
    except UnicodeDecodeError:
        return False
    others = [character for character in text if character > "\x7f"]
    chinese = sum("\u4e00" <= character <= "\u9fff" or "\u3000" <= character <= "\u303f"
                  or "\uff00" <= character <= "\uffef" for character in others)  # fmt: skip
    return bool(others) and 10 * chinese >= 9 * len(others)
