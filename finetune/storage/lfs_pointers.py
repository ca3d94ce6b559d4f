"""Files that git-lfs left as pointers: three lines of text where the content should be."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UserError

_BEGINNING = b"version https://git-lfs"
_MOST_BYTES = 1024
_MAX_LISTED = 5


def is_pointer(path: Path) -> bool:
    """Whether a file is such a pointer."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return False


def refuse_pointers(folder: Path) -> None:
    """Refuses a folder that was cloned without its large files.

    Raises:
        UserError: Files in it are pointers; all are named.
    """
    found = sorted(path.name for path in folder.iterdir() if path.is_file() and is_pointer(path))
    if found:
        more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
        raise UserError(
            f"folder {folder} holds git-lfs pointers in place of {', '.join(found[:_MAX_LISTED])}{more}: "
            "run `git lfs pull` in it, or download these files"
        )
