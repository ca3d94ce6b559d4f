"""Whether the weights of an exported folder are whole.

Paddle writes them without looking at what the system answers, so that a full disk leaves a file that is cut short, and
reads such a file into whatever it gives. Their format, one tensor behind the other, little-endian:

    uint32 version, uint64 number of levels, for each: uint64 size and so many bytes
    uint32 version, int32 size of a description: in Protocol Buffers, field 1 the type, field 2 the sizes
    the numbers

How many there must be is told by the graph.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from finetune.errors import UserError
from finetune.serving.decoding.exported import PROGRAM_FILE, WEIGHTS_FILE
from finetune.storage.files import read_json_object

# paddle.framework.proto: VarType.Type
_ITEM_BYTES = {0: 1, 1: 2, 2: 4, 3: 8, 4: 2, 5: 4, 6: 8, 20: 1, 21: 1, 22: 2}
_TYPE_FIELD, _SIZE_FIELD, _PACKED_SIZES_FIELD = 0x08, 0x10, 0x12
_MAX_DESCRIPTION = 4096


def check_exported_weights(folder: Path) -> None:
    """Compares the tensors in the file of weights with the parameters of the graph.

    Raises:
        UserError: There are more or fewer, or the last one is cut short.
    """
    path = folder / WEIGHTS_FILE
    wanted = _num_parameters(folder / PROGRAM_FILE)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            found = 0
            while file.tell() < size:
                _skip_tensor(file, size)
                found += 1
        except (struct.error, ValueError, KeyError, IndexError):
            raise UserError(
                f"{path} is cut short or damaged: it ends within tensor {found + 1} of {wanted}; export the model again"
            ) from None
    if found != wanted:
        raise UserError(
            f"{path} holds {found} tensors, but the graph beside it has {wanted}: export the model again"
        )


def _num_parameters(path: Path) -> int:
    remedy = "export the model again"
    program = read_json_object(path, remedy=remedy)
    try:
        operations = program["program"]["regions"][0]["blocks"][0]["ops"]
        return sum(1 for each in operations if each["#"] == "p")
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{path} is no graph of Paddle's: {remedy}") from None


def _skip_tensor(file: BinaryIO, size: int) -> None:
    _, num_levels = struct.unpack("<IQ", file.read(12))
    for _ in range(num_levels):
        (level_bytes,) = struct.unpack("<Q", file.read(8))
        _skip(file, level_bytes, size)
    _, length = struct.unpack("<Ii", file.read(8))
    if not 0 < length <= _MAX_DESCRIPTION:
        raise ValueError("no description")
    _skip(file, _num_bytes(file.read(length)), size)


def _skip(file: BinaryIO, num_bytes: int, size: int) -> None:
    if file.seek(num_bytes, os.SEEK_CUR) > size:
        raise ValueError("cut short")


def _num_bytes(description: bytes) -> int:
    """Of the numbers of a tensor."""
    place, item_bytes, count = 0, 0, 1
    while place < len(description):
        field, place = description[place], place + 1
        value, place = _read_varint(description, place)
        if field == _TYPE_FIELD:
            item_bytes = _ITEM_BYTES[value]
        elif field == _SIZE_FIELD:
            count *= value
        elif field == _PACKED_SIZES_FIELD:
            end = place + value
            while place < end:
                value, place = _read_varint(description, place)
                count *= value
        else:
            raise ValueError("unknown field")
    return count * item_bytes


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the place behind it."""
    value = shift = 0
    while data[place] & 0x80:
        value |= (data[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
    return value | data[place] << shift, place + 1
