"""What the safetensors library refuses is refused here; what both read is the same."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from finetune.errors import UserError
from finetune.storage.dtypes import SAFETENSORS_CODES
from finetune.storage.safetensors_files import read_safetensors

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "none": {"dtype": "I64", "shape": [0, 4], "data_offsets": [24, 24]},
    "b": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
    "c": {"dtype": "BOOL", "shape": [], "data_offsets": [34, 35]},
}
DATA = bytes(range(35))


def encode(header: Any, data: bytes = DATA) -> bytes:
    """A file with that header, given as text or as what JSON makes of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed(path: str, value: Any) -> bytes:
    """A file of which one value in the header is another; `path` is separated by slashes."""
    header = copy.deepcopy(HEADER)
    *outer, last = path.split("/")
    place: Any = header
    for key in outer:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return encode(header)


def replaced(old: str, new: str) -> bytes:
    """A file of which the header's text is another."""
    text = json.dumps(HEADER)
    assert text.count(old) >= 1
    return encode(text.replace(old, new, 1).encode())


def library_reads(content: bytes) -> dict[str, Any] | None:
    try:
        return dict(deserialize(content))
    except SafetensorError:
        return None


def check_agreement(content: bytes, path: Path) -> bool:
    """Whether both refuse a file, or both read the same; returns whether it is read."""
    path.write_bytes(content)
    theirs = library_reads(content)
    try:
        ours = read_safetensors(path).arrays
    except UserError as error:
        assert str(path) in str(error)
        return False
    assert theirs is not None, "the library refuses what is read here"
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert list(array.shape) == theirs[name]["shape"]
        assert SAFETENSORS_CODES[theirs[name]["dtype"]] == array.dtype
        assert array.read().tobytes() == bytes(theirs[name]["data"])
        assert array.load().tobytes() == bytes(theirs[name]["data"])
    return True


def test_a_good_file_is_read(tmp_path):
    assert check_agreement(encode(HEADER), tmp_path / "x")
    assert check_agreement(encode(json.dumps(HEADER).encode() + b" \n "), tmp_path / "x")
    assert check_agreement(encode({}, b""), tmp_path / "x")
    assert read_safetensors(tmp_path / "x").format is None


REFUSED = {
    "offsets of no bytes": (changed("a/data_offsets", [0, 0]), r"tensor 'a' of F32 \[2, 3\] has 24 bytes, but data_offsets \[0, 0\] hold 0"),
    "another type": (changed("a/dtype", "F16"), r"tensor 'a' of F16 \[2, 3\] has 12 bytes"),
    "another shape": (changed("b/shape", [4]), r"tensor 'b' of BF16 \[4\] has 8 bytes"),
    "a gap": (encode(HEADER | {"c": {"dtype": "BOOL", "shape": [], "data_offsets": [35, 36]}}, DATA + b"x"), r"tensor 'c' at 35 leaves a gap after 'b', which ends at 34"),
    "an overlap": (encode(HEADER | {"d": {"dtype": "U8", "shape": [2], "data_offsets": [33, 35]}}), "tensor 'd' at 33 overlaps with 'b'"),
    "the same bytes twice": (encode(HEADER | {"d": HEADER["b"]}), "overlaps with"),
    "a gap before the first": (changed("a/data_offsets", [1, 25]), "tensor 'none' at 24 leaves a gap after the header|at 1"),
    "offsets in disorder": (changed("a/data_offsets", [24, 0]), r"data_offsets \[24, 0\] hold -24"),
    "an unknown type": (changed("a/dtype", "F31"), "tensor 'a' has element type 'F31', which is not read here: save the model in one of float64"),
    "a type that is not read": (changed("b/dtype", "F8_E4M3"), "tensor 'b' has element type 'F8_E4M3'"),
    "a type that is no text": (changed("a/dtype", 7), "element type 7"),
    "a name twice": (replaced('"b": {', '"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "b": {'), "'a' stands there twice"),
    "the same entry twice": (replaced('"b": {', '"c": {"dtype": "BOOL", "shape": [], "data_offsets": [34, 35]}, "b": {'), "'c' stands there twice"),
    "a field twice": (replaced('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"'), "'dtype' stands there twice"),
    "metadata that is no text": (changed("__metadata__/format", 1), "__metadata__ does not hold text by name"),
    "metadata in a list": (changed("__metadata__", ["pt"]), "__metadata__ does not hold text by name"),
    "a size below 0": (changed("a/shape", [-2, -3]), "-2 is below 0"),
    "a size that is a float": (changed("a/shape", [2.0, 3]), r"tensor 'a' has shape \[2.0, 3\]"),
    "a size that is a boolean": (changed("c/shape", [True]), r"tensor 'c' has shape \[True\]"),
    "a size of minus 0": (replaced("[0, 24]", "[-0, 24]"), "-0 is below 0"),
    "a size beyond 64 bits": (changed("none/shape", [2**62, 4, 0]), "tensor 'none' of I64"),
    "a shape that is no list": (changed("a/shape", 6), "tensor 'a' has shape 6"),
    "three offsets": (changed("a/data_offsets", [0, 12, 24]), r"has data_offsets \[0, 12, 24\]"),
    "a field missing": (replaced('"dtype": "F32", ', ""), "tensor 'a' is not described by data_offsets, dtype, shape"),
    "an entry that is no object": (changed("a", None), "tensor 'a' is not described by"),
    "no object": (encode([1, 2]), "the header is no JSON object"),
    "no number": (changed("a/shape", [float("nan")]), "NaN is no JSON"),
    "half a character": (replaced('"a"', '"\\ud800"'), "no valid safetensors file"),
    "no text": (replaced('"a"', '"#"').replace(b"#", b"\xff"), "no valid safetensors file"),
    "deep nesting": (encode(b"[" * 100_000), "no valid safetensors file"),
    "bytes after the end": (encode(HEADER, DATA + b"x"), r"has \d+ bytes but its header promises \d+: copy it again"),
    "a cut end": (encode(HEADER, DATA[:-1]), r"has \d+ bytes but its header promises \d+: copy it again"),
    "zeros after the header": (encode(json.dumps(HEADER).encode() + b"\0"), "Extra data"),
    "a length beyond the file": (struct.pack("<Q", 10**6) + encode(HEADER)[8:], "the header is longer than the file"),
    "a length beyond the limit": (struct.pack("<Q", 2**63) + encode(HEADER)[8:], "more than 100000000"),
    "the length alone": (struct.pack("<Q", 1), "the header is longer than the file"),
    "no length": (b"abc", "no valid safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_wrong_is_told(kind, tmp_path):
    content, message = REFUSED[kind]
    path = tmp_path / "model.safetensors"
    assert not check_agreement(content, path)
    with pytest.raises(UserError, match=message):
        read_safetensors(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(
        UserError, match=r"x.safetensors cannot be read .No such file or directory.: copy it there"
    ):
        read_safetensors(tmp_path / "x.safetensors")


def test_sixteen_bit_integers_are_paddlenlps_bfloat16(tmp_path):
    assert check_agreement(changed("b/dtype", "U16"), tmp_path / "x")
    assert read_safetensors(tmp_path / "x").arrays["b"].dtype == np.uint16


VALUES = st.one_of(
    st.integers(-2, 40),
    st.sampled_from(
        [2**31, 2**32, 2**62, 2**63, 2**64, 2**80, 1.5, True, None, "F32", "F16", "U8", "x", [], {}]
    ),
    st.lists(st.integers(0, 40), max_size=3),
    st.sampled_from(sorted({"F64", "C64", "U32", "U64", "F8_E5M2", "F4", *SAFETENSORS_CODES})),
)
PLACES = st.sampled_from(
    [
        f"{name}{field}"
        for name in ("a", "none", "b", "c")
        for field in ("", "/dtype", "/shape", "/data_offsets", "/data_offsets/0", "/data_offsets/1", "/extra")
    ]
    + ["a/shape/0", "a/shape/1", "b/shape/0", "__metadata__", "__metadata__/format", "d"]
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=PLACES, value=VALUES)
def test_other_values_in_the_header(tmp_path, place, value):
    check_agreement(changed(place, value), tmp_path / "x")


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, len(encode(HEADER)) - 1), byte=st.integers(0, 255), kind=st.sampled_from("rdi")
)
def test_other_bytes(tmp_path, position, byte, kind):
    """A byte is replaced, deleted or inserted, with the length of the header as it was and mended."""
    content = encode(HEADER)
    new = b"" if kind == "d" else bytes([byte])
    broken = content[:position] + new + content[position + (kind != "i") :]
    check_agreement(broken, tmp_path / "x")
    end = len(content) - len(DATA)
    if 8 <= position < end:
        length = end - 8 + {"r": 0, "d": -1, "i": 1}[kind]
        check_agreement(struct.pack("<Q", length) + broken[8:], tmp_path / "x")


def test_mutations_leave_some_files_readable(tmp_path):
    """Guards the two tests above: were everything refused, they would show nothing."""
    content = encode(HEADER)
    read = [
        check_agreement(content[:position] + b"1" + content[position + 1 :], tmp_path / "x")
        for position in range(8, len(content))
    ]
    assert sum(read) > 40 and not all(read)
