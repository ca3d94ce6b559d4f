"""Folders with one or several damaged files: what models, adapters and checkpoints have in common."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.mutations import (
    BYTE_CHANGES,
    JSON_CHANGES,
    PLACES,
    WHOLE_CONTENTS,
    change_bytes,
    change_json,
    dump_json,
)

_KINDS = ("json", "json", "json", "bytes", "whole", "absent", "folder", "pipe", "link", "swapped")
_HEAD_BYTES = 4096

FileDamage = tuple[str, str, Any]
"""The file (its name in the folder), how it is damaged, and with what."""


def draw_damages(names: Sequence[str], max_size: int = 2) -> st.SearchStrategy[list[FileDamage]]:
    """Damages of some of the files."""
    return st.lists(st.sampled_from(names).flatmap(_draw_damage), min_size=1, max_size=max_size)


def _draw_damage(name: str) -> st.SearchStrategy[FileDamage]:
    def draw_how(kind: str) -> st.SearchStrategy[FileDamage]:
        values = {"json": JSON_CHANGES, "bytes": BYTE_CHANGES, "whole": WHOLE_CONTENTS, "swapped": PLACES}
        return st.tuples(st.just(name), st.just(kind), values.get(kind, st.none()))

    return st.sampled_from(_KINDS).flatmap(draw_how)


def copy_damaged(good: Path, place: Path, damages: Sequence[FileDamage]) -> Path:
    """A copy of a folder in which some files are damaged; the others are hard links."""
    shutil.copytree(good, place, copy_function=os.link)
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    for name, kind, value in damages:
        path = place / name
        content = path.read_bytes() if path.is_file() else b""
        if path.is_dir() and not path.is_symlink():
            continue
        path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(path.name)  # a circle
        elif kind == "swapped":
            path.write_bytes((good / names[int(value * len(names))]).read_bytes())
        elif kind != "absent":
            path.write_bytes(_damage(path, content, kind, value))
    return place


def _damage(path: Path, content: bytes, kind: str, value: Any) -> bytes:
    if kind == "whole":
        return bytes(value)
    if path.suffix == ".safetensors":
        return _damage_safetensors(content, kind, value)
    if kind == "json":
        try:
            return dump_json(change_json(json.loads(content), value))
        except (ValueError, RecursionError):
            return dump_json(value)
    return change_bytes(content[:_HEAD_BYTES], value) + content[_HEAD_BYTES:]


def _damage_safetensors(content: bytes, kind: str, value: Any) -> bytes:
    """Changes the header, where what is wrong would give wrong weights, and keeps its length right half of the time."""
    if len(content) < 8:
        return content
    (size,) = struct.unpack("<Q", content[:8])
    if kind == "bytes":
        return change_bytes(content[: 8 + size], value) + content[8 + size :]
    try:
        header = dump_json(change_json(json.loads(content[8 : 8 + size]), value))
    except (ValueError, RecursionError):
        header = dump_json(value)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]
