"""Settings that name several paths."""

from __future__ import annotations

import os


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
