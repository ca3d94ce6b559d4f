"""Settings that name one path or several."""

from __future__ import annotations

import os

from finetune.errors import find_remedy

_MAX_SHOWN_CHARS = 80


def split_paths(value: str) -> list[str]:
    """The paths of a setting such as ``a.json,b.csv``; a path that exists as it stands is one path."""
    if os.path.exists(os.path.expanduser(value)):
        return [os.path.expanduser(value)]
    parts = [part.strip() for part in value.split(",")]
    return [os.path.expanduser(part) for part in parts if part]


def looks_like_path(value: str) -> bool:
    """True for a value that can only mean a place on disk, or that is one.

    One slash alone is a hub name (``owner/model``), and so is what begins with a hub (``hf://owner/model``).
    """
    if "://" in value:
        return False
    return value.startswith((".", "/", "~")) or value.count("/") > 1 or os.path.exists(value)


def looks_like_hub_name(value: str) -> bool:
    """True for ``owner/name``, with or without a hub in front, where no such place is on disk."""
    return (
        not os.path.exists(value)
        and value.rpartition("://")[2].count("/") == 1
        and not looks_like_path(value)
    )


def describe_missing(path: str, what: str = "does not exist") -> str:
    """Why there is nothing at a path, and what to do.

    Args:
        path: Leads to nothing that can be used.
        what: Said where nothing is in its way.
    """
    return find_obstacle(path) or f"which {what} (looked in {os.getcwd()}): check the path"


def find_obstacle(path: str) -> str | None:
    """Why the operating system cannot even look at a path; None where it can, be there something or not."""
    try:
        os.stat(os.path.expanduser(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"which cannot be used ({error.strerror}): {find_remedy(error.errno)}"
    return None


def shorten(path: str) -> str:
    """A path for a message."""
    return path if len(path) <= _MAX_SHOWN_CHARS else f"{path[:38]}...{path[-38:]}"
