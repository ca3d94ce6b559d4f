"""Whether an adapter continues on the base weights it began with.

A checkpoint of an adapter holds no base weights, so what a run began with is noted beside it: for every weight file its
name, its size and a hash of samples. The samples are the first 64 KiB (with the header of a safetensors file, so every
name, type and shape), the last 64 KiB, and 4 KiB at each of 64 places spread evenly. Other weights of the same shapes
differ nearly everywhere, so they are seen; a few numbers changed between the samples are not. It costs about
0.4 MB of reading a file, however large.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.storage.files import is_present, read_json_or_empty, write_json

if TYPE_CHECKING:
    from finetune.run.directory import RunDirectory

BASE_FILE = ".base_weights.json"
_PATTERNS = ("*.safetensors", "*.bin", "*.pdparams")
_END_BYTES = 1 << 16
_SAMPLE_BYTES = 1 << 12
_NUM_SAMPLES = 64


def describe_weights(folder: Path) -> dict[str, Any]:
    """Name of every weight file, with its size and the hash of samples of it."""
    found = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})
    return {
        path.name: {"bytes": path.stat().st_size, "samples_sha256": _hash_samples(path)} for path in found
    }


def compare_base(run: RunDirectory, folder: Path) -> list[str]:
    """Notes the base weights of a run that begins; warns where one continues on others.

    Args:
        run: Its output folder, and the checkpoint it continues from.
        folder: Holds the base weights.
    """
    now = describe_weights(folder)
    note = run.path / BASE_FILE
    before = read_json_or_empty((run.resume.parent if run.resume else run.path) / BASE_FILE)
    is_continued = run.resume is not None or run.trained
    if not is_continued or not is_present(note):
        write_json(note, now)
    if not is_continued or not before or before == now:
        return []
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return [
        f"warning: the adapter was trained on other base weights than {folder} holds now ({', '.join(changed)}): its "
        "loss will jump. Put the earlier weights back, or begin anew in another output_dir"
    ]


def _hash_samples(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    places = [(0, _END_BYTES), (max(0, size - _END_BYTES), _END_BYTES)]
    places += [(size * number // _NUM_SAMPLES, _SAMPLE_BYTES) for number in range(1, _NUM_SAMPLES)]
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        for offset, length in places:
            file.seek(offset)
            digest.update(file.read(length))
    return digest.hexdigest()
