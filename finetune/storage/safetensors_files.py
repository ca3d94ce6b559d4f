"""The header of a safetensors file, read and written.

    8 bytes, little end first: length of the header
    the header, JSON:          {name: {"dtype": code, "shape": [...], "data_offsets": [begin, end]}, ...}
    the tensors' bytes         without gaps, in the order of their offsets, up to the end of the file

A header that says otherwise is refused as the format's own library refuses it: what such a file gives as weights
would be bytes of other tensors. `__metadata__` holds text only; "format" there says who named the tensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from finetune.errors import UserError
from finetune.storage.arrays import StoredArray
from finetune.storage.dtypes import NAMES, SAFETENSORS_CODES, array_dtype, num_bytes, safetensors_code
from finetune.storage.files import open_file

_MAX_HEADER_BYTES = 100_000_000
_MAX_SIZE = 2**63  # of an axis and of a tensor in elements
_MAX_AXES = 32  # of NumPy
_ALIGNMENT = 8
_FIELDS = {"dtype", "shape", "data_offsets"}


class FileContent(NamedTuple):
    """What a weight file holds.

    Attributes:
        arrays: By name.
        format: "pt" for tensors that Hugging Face named, "np" or "pd" for PaddleNLP's, None when unsaid.
    """

    arrays: dict[str, StoredArray]
    format: str | None


def read_safetensors(path: Path) -> FileContent:
    """Where the tensors of a safetensors file lie; their bytes are not touched.

    Raises:
        UserError: The file is missing, cut short, of another format, or its header contradicts itself.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_header(file, size)
        metadata = _checked_metadata(header.pop("__metadata__", None))
        arrays = {name: _stored_array(path, name, entry) for name, entry in header.items()}
        end = start + _check_places(arrays)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): copy it there") from None
    except (struct.error, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no valid safetensors file ({error}): copy it again") from None
    if end != size:
        raise UserError(f"{path} has {size} bytes but its header promises {end}: copy it again")
    placed = {name: array._replace(start=start + array.start) for name, array in arrays.items()}
    return FileContent(placed, metadata.get("format"))


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the bytes of the tensors begin."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, more than {_MAX_HEADER_BYTES}")
    if length > size - 8:
        raise ValueError("the header is longer than the file")
    text = file.read(length).decode("utf-8")
    header = json.loads(
        text, object_pairs_hook=_without_doubles, parse_int=_parse_natural, parse_constant=_refuse_constant
    )
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    if "\\u" in text:  # half a pair of surrogates is no character
        json.dumps(header, ensure_ascii=False).encode("utf-8")
    return header, 8 + length


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name!r} stands there twice")
        content[name] = value
    return content


def _parse_natural(text: str) -> int:
    if text.startswith("-"):
        raise ValueError(f"{text} is below 0")
    return int(text)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ does not hold text by name")
    return metadata


def _stored_array(path: Path, name: str, entry: Any) -> StoredArray:
    """A tensor by its header, its start counted from the end of the header."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(f"tensor {name!r} is not described by {', '.join(sorted(_FIELDS))}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in SAFETENSORS_CODES:
        raise UserError(
            f"{path}: tensor {name!r} has element type {code!r}, which is not read here: save the model in one of "
            f"{', '.join(NAMES)}"
        )
    if not _are_naturals(shape) or len(shape) > _MAX_AXES:
        raise ValueError(f"tensor {name!r} has shape {shape}")
    if not _are_naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has data_offsets {offsets}")
    dtype = SAFETENSORS_CODES[code]
    begin, end = offsets
    size = num_bytes(dtype, shape)
    # The product of the sizes may not go beyond 64 bits on the way either, as where a 0 comes last.
    if math.prod(max(each, 1) for each in shape) * dtype.itemsize >= _MAX_SIZE or end - begin != size:
        raise ValueError(
            f"tensor {name!r} of {code} {shape} has {size} bytes, but data_offsets {offsets} hold {end - begin}"
        )
    return StoredArray(path, dtype, tuple(shape), begin)


def _are_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _check_places(arrays: Mapping[str, StoredArray]) -> int:
    """Whether the tensors cover all bytes, each of them once; returns the number of bytes."""
    covered, before = 0, "the header"
    for name, array in sorted(arrays.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if array.start != covered:
            what = "overlaps with" if array.start < covered else "leaves a gap after"
            raise ValueError(f"tensor {name!r} at {array.start} {what} {before}, which ends at {covered}")
        covered, before = covered + array.num_bytes, repr(name)
    return covered


def encode_header(
    tensors: Mapping[str, tuple[Any, Iterable[int]]], format_name: str
) -> tuple[bytes, dict[str, int]]:
    """First bytes of a file, and where in it each tensor begins.

    Args:
        tensors: Name -> (element type, shape).
        format_name: Who named the tensors, see `FileContent`.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": format_name}}
    end = 0
    specs = [(name, array_dtype(dtype), list(shape)) for name, (dtype, shape) in tensors.items()]
    # Wide types first, so that every tensor begins at a multiple of its element's size.
    for name, dtype, shape in sorted(specs, key=lambda spec: -spec[1].itemsize):
        begin, end = end, end + num_bytes(dtype, shape)
        entries[name] = {"dtype": safetensors_code(dtype), "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    del entries["__metadata__"]
    return header, {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
