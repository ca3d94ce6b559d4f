"""Files that are seen whole or not at all, whatever moment a process dies at."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a whole file so that a reader, or a kill at any moment, sees the old or the new one.

    One process at a time may write a path: what a killed one left under the temporary name is
    overwritten by the next.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON, Chinese as it is, as a whole."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    write_atomically(path, (text + "\n").encode())


def read_json_or_empty(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file; an empty one where the file is missing or cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def give_usual_mode(path: str | os.PathLike[str]) -> None:
    """Gives a file the mode that new files get; some libraries write theirs readable by the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
