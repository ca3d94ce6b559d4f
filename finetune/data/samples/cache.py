"""What a run's data became, kept on disk: the next run with the same files and settings maps it into memory.

An entry is two files in the cache folder: ``<key>.bin``, the flat arrays of the samples end to end, and
``<key>.json``, which says where each is, holds reports and prompts, and has the size and hash of the first; it is
written last. The key is a hash of the content of data and tokenizer files, of all settings that matter, and
of the versions of this code and of the tokenizer libraries.

Of several processes that want an entry, one makes it under a file lock and the others look for it now and
then. The system releases the lock of a process that dies. Entries that nobody has used for `KEEP_DAYS` days
are removed when another is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.data.reading.notes import ReadingNotes
from finetune.data.samples.data_report import DataReport
from finetune.data.samples.sample_store import SampleStore
from finetune.data.samples.tokenize import Prompt
from finetune.errors import UserError
from finetune.machine.screen import print_text
from finetune.storage.files import open_file, read_json_object, write_json

CACHE_VERSION = 8
"""To be raised when the same files and settings give other samples."""

KEEP_DAYS = 30
POLL_SECONDS = 0.2
_LIBRARIES = ("sentencepiece", "tiktoken", "tokenizers", "paddlenlp", "jinja2", "numpy")
_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass
class EncodedData:
    """The data of a run, as they are trained and evaluated on.

    Attributes:
        stores: Samples by split, of the kind that the entry is read with.
        prompts: Prompts by split.
        reports: Counts of the lines read, kept and left out, by split.
    """

    stores: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompts: dict[str, list[Prompt]] = dataclasses.field(default_factory=dict)
    reports: dict[str, DataReport] = dataclasses.field(default_factory=dict)


def default_folder() -> Path:
    """``paddle_finetune/data`` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "paddle_finetune" / "data"


def make_key(settings: Mapping[str, Any], files: Sequence[Path]) -> str:
    """The name of an entry.

    Args:
        settings: What else decides the result; JSON values.
        files: Read by their content; a name that is no file counts as such.
    """
    libraries = {name: _version(name) for name in _LIBRARIES}
    parts = [CACHE_VERSION, libraries, settings, [[str(file), hash_file(file)] for file in files]]
    return hashlib.blake2b(
        json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=20
    ).hexdigest()


def hash_file(path: Path) -> str:
    """Hash of a file's content; "" when there is none."""
    digest = hashlib.blake2b(digest_size=20)
    try:
        with open_file(path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except (OSError, UserError):
        return ""
    return digest.hexdigest()


class ArrayStore(Protocol):
    """Samples in flat arrays.

    Attributes:
        NAMES: Of the arrays.
    """

    NAMES: ClassVar[tuple[str, ...]]

    def __init__(self, arrays: Mapping[str, NDArray[Any]]): ...

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All there is, by name, each of one axis."""
        ...


def load_or_build(
    folder: Path, key: str, build: Callable[[], EncodedData], kind: type[ArrayStore] = SampleStore
) -> EncodedData:
    """The entry, made anew when it is missing or damaged.

    Args:
        folder: The cache.
        key: From `make_key`.
        build: Makes what is missing; its errors pass through.
        kind: Of the samples; kinds must not share keys.
    """
    if (found := load(folder, key, kind)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{key}.lock").open("wb")
    except OSError as error:
        _warn(folder, error)
        return build()
    with lock:
        while not _try_lock(lock.fileno()):
            time.sleep(POLL_SECONDS)
        if (found := load(folder, key, kind)) is not None:  # another process has made it meanwhile
            return found
        data = build()
        try:
            store(folder, key, data)
            remove_old(folder)
        except OSError as error:
            _warn(folder, error)
        return data


def store(folder: Path, key: str, data: EncodedData) -> None:
    """Writes an entry; one process at a time.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    arrays = {
        f"{split}/{name}": array for split, held in data.stores.items() for name, array in held.arrays.items()
    }
    path = folder / f"{key}.bin"
    temporary = folder / f".{key}.bin.tmp"
    layout: dict[str, Any] = {}
    digest = hashlib.blake2b(digest_size=20)
    with temporary.open("wb") as file:
        for name, array in arrays.items():
            layout[name] = {"dtype": array.dtype.str, "size": array.size, "start": file.tell()}
            content = np.ascontiguousarray(array).view(np.uint8).data if array.size else b""
            for part in (content, bytes(-len(content) % _ALIGNMENT)):
                digest.update(part)
                file.write(part)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    header = {
        "arrays": layout,
        "size": size,
        "hash": digest.hexdigest(),
        "splits": list(data.stores),
        "prompts": {split: [_prompt_fields(each) for each in held] for split, held in data.prompts.items()},
        "reports": {split: _report_fields(report) for split, report in data.reports.items()},
    }
    write_json(folder / f"{key}.json", {"content": header, "hash": _hash_json(header)})


def load(folder: Path, key: str, kind: type[ArrayStore] = SampleStore) -> EncodedData | None:
    """Reads an entry; None when it is missing, cut short or damaged."""
    path, header_path = folder / f"{key}.bin", folder / f"{key}.json"
    try:
        whole = read_json_object(header_path)
        header = whole["content"]
        is_whole = whole["hash"] == _hash_json(header) and path.stat().st_size == header["size"]
        if not is_whole or hash_file(path) != header["hash"]:
            return None
        data = _restore(header, path, kind)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    with contextlib.suppress(OSError):
        os.utime(header_path)  # counts as used
    return data


def remove_old(folder: Path) -> None:
    """Removes entries that have not been used for `KEEP_DAYS` days."""
    oldest = time.time() - KEEP_DAYS * 86_400
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                for name in (path, path.with_suffix(".bin"), path.with_suffix(".lock")):
                    name.unlink(missing_ok=True)


def _restore(header: Mapping[str, Any], path: Path, kind: type[ArrayStore]) -> EncodedData:
    content = np.memmap(path, dtype=np.uint8, mode="r") if header["size"] else np.zeros(0, np.uint8)
    arrays = {}
    for name, place in header["arrays"].items():
        dtype = np.dtype(place["dtype"])
        stop = place["start"] + place["size"] * dtype.itemsize
        arrays[name] = np.asarray(content[place["start"] : stop]).view(dtype)
    stores = {
        split: kind({name: arrays[f"{split}/{name}"] for name in kind.NAMES}) for split in header["splits"]
    }
    prompts = {
        split: [Prompt(**{**each, "input_ids": np.array(each["input_ids"], dtype=np.int32)}) for each in held]
        for split, held in header["prompts"].items()
    }
    reports = {split: _restore_report(fields) for split, fields in header["reports"].items()}
    return EncodedData(stores, prompts, reports)


def _report_fields(report: DataReport) -> dict[str, Any]:
    counts = {name: dict(counter) for name, counter in vars(report.notes).items()}
    return {
        **vars(report),
        "num_dropped": dict(report.num_dropped),
        "notes": counts,
    }  # asdict() spoils a Counter


def _restore_report(fields: dict[str, Any]) -> DataReport:
    kept = {"files": tuple(fields["files"]), "num_dropped": Counter(fields["num_dropped"])}
    notes = ReadingNotes(**{name: Counter(counts) for name, counts in fields["notes"].items()})
    return DataReport(**{**fields, **kept, "notes": notes})


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    return {**dataclasses.asdict(prompt), "input_ids": prompt.input_ids.tolist()}


def _hash_json(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=20).hexdigest()


def _try_lock(descriptor: int) -> bool:
    """Whether the lock is ours; also where the file system has none."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _warn(folder: Path, error: OSError) -> None:
    print_text(
        f"data_cache: {folder} cannot be written ({error.strerror or error}): the data are not kept. "
        "Set data_cache_dir to another folder, or data_cache to false.",
        stream=sys.stderr,
    )
