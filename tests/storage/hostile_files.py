"""Weight files that ask a reader for what it must not do: follow pointers, run code, go on without end, fill memory.

Pickles are written instruction by instruction, since no library writes such ones.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MINUS_ONE = b"J\xff\xff\xff\xff"
NUM_DOUBLINGS = 60


def plain(value: Any) -> bytes:
    """The instructions that push a plain value."""
    return pickle.dumps(value, 2)[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"")


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def whole(*instructions: bytes) -> bytes:
    return b"\x80\x04" + b"".join(instructions) + b"."


def holding(value: bytes) -> bytes:
    """A pickle of {"a": value}."""
    return whole(b"}", plain("a"), value, b"s")


def element_type(code: str, flags: bytes = plain(0)) -> bytes:
    """NumPy's type, told by its state that it has no pointers."""
    state = b"(" + plain(3) + plain("|") + b"NNN" + 2 * MINUS_ONE + flags + b"t"
    return call(named("numpy", "dtype"), plain(code), b"\x89", b"\x88") + state + b"b"


def array(shape: bytes, code: str = "f4", content: bytes = b"C\x04\x00\x00\x00\x00") -> bytes:
    """An array as NumPy pickles it."""
    empty = call(
        named("numpy.core.multiarray", "_reconstruct"), named("numpy", "ndarray"), plain((0,)), b"C\x01b"
    )
    return empty + b"(" + plain(1) + shape + element_type(code) + b"\x89" + content + b"tb"


def doubled_tuple(*, by_memo: bool = False) -> bytes:
    """((((), ()), ((), ())), ...): 2**60 empty tuples for who visits them all."""
    if not by_memo:
        return b")" + b"2\x86" * NUM_DOUBLINGS
    return b")q\x090" + b"h\x09h\x09\x86q\x090" * NUM_DOUBLINGS + b"h\x09"


def pdparams() -> dict[str, bytes]:
    """Contents of `.pdparams` files by what they try."""
    pointer, bomb = b"C\x08AAAAAAAA", doubled_tuple(by_memo=True)
    long_list = b"](" + b"N" * 100_000 + b"eq\x01"
    copies = b"".join(call(named("builtins", "tuple"), b"h\x01") + b"0" for _ in range(3000))
    texts = b"".join(call(named("_codecs", "encode"), b"h\x01", plain("latin1")) for _ in range(3000))
    return {
        "scalar of a pointer": holding(
            call(named("numpy.core.multiarray", "scalar"), element_type("O"), pointer)
        ),
        "array over pointers": holding(
            call(named("numpy", "ndarray"), plain((1,)), element_type("O"), pointer)
        ),
        "array of pointers": holding(array(plain((1,)), "O", pointer)),
        "array of text": holding(array(plain((1,)), "U1")),
        "array of dates": holding(array(plain((1,)), "M8", pointer)),
        "array of structures": holding(array(plain((1,)), "V8", pointer)),
        "huge array": holding(call(named("numpy", "ndarray"), plain((2**40,)))),
        "huge empty array": holding(array(plain((2**62, 4, 0)), content=b"C\x00")),
        "array of many axes": holding(array(plain((1,) * 1000))),
        "array of negative size": holding(array(plain((-1, -1)))),
        "shape without end": holding(array(bomb)),
        "array without content": holding(call(named("numpy.core.multiarray", "_reconstruct"))),
        "code": holding(call(named("posix", "system"), plain("touch /dev/null"))),
        "code by another name": holding(call(plain("posix") + plain("system") + b"\x93", plain("true"))),
        "call of a method": holding(call(plain("text"), plain("text"))),
        "class with attributes": holding(plain("text") + b"}b"),
        "key without end": whole(b"}", doubled_tuple(), b"K\x01s"),
        "key without end by memo": whole(b"}", bomb, b"K\x01s"),
        "content without end": whole(doubled_tuple()),
        "content without end by memo": whole(bomb),
        "value without end": holding(bomb),
        "name without end": holding(bomb + plain("dtype") + b"\x93"),
        "element type without end": holding(call(named("numpy", "dtype"), bomb)),
        "persistent object without end": holding(bomb + b"Q"),
        "memo at a far place": whole(b"N", b"r\xff\xff\xff\x7f"),
        "long integer": holding(b"\x8b\x00\x00\x00\x7f" + b"\x01" * 100),
        "integer of 255 bytes": holding(b"\x8a\xff" + b"\x01" * 255),
        "integer in digits": holding(b"L" + b"9" * 5_000_000 + b"L\n"),
        "long name": holding(b"c" + b"a" * 10_000_000 + b"\nb\n"),
        "copies of a list": holding(long_list + copies),
        "copies of a text": holding(
            b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000 + b"q\x01" + texts
        ),
        "deep lists": holding(b"]" * 1_000_000 + b"a" * 999_999),
        "deep marks": whole(b"(" * 2_000_000),
        "many instructions": whole(b"N" * 4_100_000),
        "text beyond the end": holding(b"X\xff\xff\xff\xff"),
        "bytes beyond the end": holding(b"\x8e" + b"\xff" * 8),
        "broken text": whole(b"}", b"X\x03\x00\x00\x00\xed\xa0\x80", array(plain((1,))), b"s"),
        "set of frozen sets": holding(b"\x8f\x91"),
        "nothing": b"",
        "half an instruction": b"\x80\x04}X\x05",
    }


def tensor(state: bytes = b"", shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,)) -> bytes:
    """A tensor over storage 0, as `torch.save` writes it."""
    return (
        call(
            named("torch._utils", "_rebuild_tensor_v2"),
            storage(),
            plain(0),
            plain(shape),
            plain(strides),
            b"\x89",
            call(named("collections", "OrderedDict")),
        )
        + state
    )


def storage(kind: bytes = named("torch", "FloatStorage"), key: bytes = plain("0"), size: int = 16) -> bytes:
    return b"(" + plain("storage") + kind + key + plain("cpu") + plain(size) + b"tQ"


def torch_pickles() -> dict[str, bytes]:
    """`data.pkl` of `.bin` files by what they try."""
    bomb = doubled_tuple(by_memo=True)
    fields = {"start": -100, "dtype": "O", "size": 100}
    parts = (plain(0), plain((4,)), plain((1,)), b"\x89", b"}")
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    return {
        "storage of pointers": holding(call(rebuild, storage(plain("O")), *parts)),
        "storage changed to pointers": holding(call(rebuild, storage() + plain(fields) + b"b", *parts)),
        "stand-in for a storage": holding(
            call(rebuild, call(named("collections", "OrderedDict")) + plain(fields) + b"b", *parts)
        ),
        "tensor with attributes": holding(tensor(plain(fields) + b"b")),
        "tensor before its storage": holding(call(rebuild, storage(), plain(-1), *parts[1:])),
        "tensor beyond its storage": holding(tensor(shape=(17,))),
        "tensor with negative strides": holding(tensor(strides=(-1,))),
        "one number repeated": holding(tensor(shape=(2**40,), strides=(0,))),
        "tensor of many axes": holding(tensor(shape=(1,) * 1000, strides=(1,) * 1000)),
        "storage of negative size": holding(call(rebuild, storage(size=-1), *parts)),
        "storage without end": holding(call(rebuild, storage(bomb), *parts)),
        "key of a storage without end": holding(call(rebuild, storage(key=bomb), *parts)),
        "key without end": whole(b"}", bomb, b"K\x01s"),
        "code": whole(call(named("os", "system"), plain("true"))),
        "missing storage": holding(call(rebuild, storage(key=plain("9")), *parts)),
        "no tensors": holding(plain("text")),
    }


def save_archive(path: Path, data: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    """An archive as `torch.save` lays it out, with 64 bytes of storage."""
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(64))


def write_all(folder: Path) -> Iterator[Path]:
    """Writes every hostile file, those of other layouts than the normal one too."""
    for name, content in pdparams().items():
        path = folder / f"{name}.pdparams"
        path.write_bytes(content)
        yield path
    for name, content in torch_pickles().items():
        path = folder / f"{name}.bin"
        save_archive(path, content)
        yield path
    compressed, encrypted, members, long = (
        folder / f"{name}.bin"
        for name in ("compressed zeros", "encrypted", "directory of many members", "long pickle")
    )
    save_archive(compressed, bytes(100_000_000), compression=zipfile.ZIP_DEFLATED)
    save_archive(encrypted, holding(tensor()))
    content = bytearray(encrypted.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 8] |= 1
    encrypted.write_bytes(content)
    entry = bytearray(content[place : content.index(b"PK\x01\x02", place + 1)])
    directory = bytes(entry) * (20_000_000 // len(entry))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(directory), 0, 0)
    members.write_bytes(directory + end)
    save_archive(long, whole(b"N0" * 34_000_000))
    yield from (compressed, encrypted, members, long)
